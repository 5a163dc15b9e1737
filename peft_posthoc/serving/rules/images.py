"""Rules about LoRAs of image models, for the programs that load those."""

from __future__ import annotations

from peft_posthoc.serving.image_subject import ImageSubject
from peft_posthoc.serving.rules.rule import REFUSED, WARNING, WRONG, Rule

_COMFY = "read: ComfyUI's comfy/lora.py"
_A1111 = "read: A1111's extensions-builtin/Lora/networks.py"
_OF_QWEN = (".txt_mlp.", ".txt_mod.", ".img_mlp.", ".img_mod.")
# By diffusers' names, modules that ComfyUI has as rows of a fused one.
_OF_FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp")


def of_parts(subject: ImageSubject) -> tuple[str, ...]:
    """Differences for biases of modules that ComfyUI has as a part of another one, or with its halves swapped."""
    of_qwen = any(part in name for name in subject.headers for part in _OF_QWEN)  # It has them apart.
    return tuple(
        name
        for name in subject.parts("diff_b")
        if name.startswith("transformer.")
        and not of_qwen
        and name.removesuffix(".diff_b").endswith((*_OF_FUSED, "norm_out.linear"))
    )


def dotted(subject: ImageSubject) -> tuple[str, ...]:
    """Names of modules with dots."""
    return tuple(name for name in subject.named if not name.startswith(("lora_unet_", "lora_te")))


def mixed(subject: ImageSubject) -> tuple[str, ...]:
    """The ranks, where there are several and nothing says a scale."""
    ranks = sorted(subject.ranks())
    said = subject.parts("alpha") or subject.has_configs
    return (f"ranks {', '.join(map(str, ranks))}",) if len(ranks) > 1 and not said else ()


def partly_without_alpha(subject: ImageSubject) -> tuple[str, ...]:
    """Modules of a Wan in musubi-tuner's names without alpha."""
    return tuple(name for name in subject.without_alpha() if name.startswith("lora_unet_blocks_"))


def doubled(subject: ImageSubject) -> tuple[str, ...]:
    """Alphas of Qwen-Image and Z-Image beside `transformer.`."""
    theirs = any(part in name for name in subject.headers for part in (".txt_mlp.", ".txt_mod.", ".context_refiner."))
    return tuple(name for name in subject.parts("alpha") if theirs and name.startswith("transformer."))


RULES: tuple[Rule, ...] = (
    Rule(
        name="peft-names-diffusers",
        engines=("diffusers",),
        severity=WRONG,
        finds=lambda s: s.of_peft,
        message=(
            "`load_lora_weights` takes such names for fal's Kontext format on Flux and fails or converts them wrongly, "
            "and finds no component in them on other models, of which it warns"
        ),
        way_out="`phlora export ADAPTER OUT --to diffusers`; or `load_lora_adapter(..., prefix='base_model.model')`",
        source="run: loaders/lora_pipeline.py",
    ),
    Rule(
        name="peft-names-comfyui",
        engines=("comfyui",),
        severity=WRONG,
        finds=lambda s: s.of_peft,
        message=(
            "knows such names of SD3, PixArt, HunyuanDiT and ACE-Step alone, without the scale that the configuration "
            "says, and leaves out what it does not know with a line in its log"
        ),
        way_out="`phlora export ADAPTER OUT.safetensors --to comfyui`",
        source=_COMFY,
    ),
    Rule(
        name="peft-names-a1111",
        engines=("a1111",),
        severity=WRONG,
        finds=lambda s: s.of_peft,
        message="finds no module by such names, and says so in its log alone",
        way_out="`phlora export ADAPTER OUT.safetensors --to kohya`",
        source=_A1111,
    ),
    Rule(
        name="dotted-names",
        engines=("a1111",),
        severity=WRONG,
        finds=dotted,
        message="takes what is before the first dot for the module's name (but newer ones on SD3), and finds none",
        way_out="`phlora export FILE OUT.safetensors --to kohya --base BASE`",
        source=_A1111,
    ),
    Rule(
        name="mixed-ranks-without-alpha",
        engines=("diffusers",),
        severity=WRONG,
        finds=mixed,
        message="scales modules of other ranks than the most common one by its alpha",
        way_out="`phlora export FILE OUT --to diffusers --base BASE` pads them to one rank",
        source="read: utils/peft_utils.py (get_peft_kwargs)",
        versions="before August 2026",
    ),
    Rule(
        name="no-alpha-wan",
        engines=("diffusers",),
        severity=REFUSED,
        finds=partly_without_alpha,
        message="needs every alpha of a Wan in musubi-tuner's names (KeyError)",
        way_out="`phlora export FILE OUT --to diffusers --base BASE`",
        source="read: loaders/lora_conversion_utils.py (_convert_musubi_wan_lora_to_diffusers)",
    ),
    Rule(
        name="alphas-of-qwen",
        engines=("diffusers",),
        severity=REFUSED,
        finds=doubled,
        message=(
            "takes a file with alphas of Qwen-Image or Z-Image for one in other names, and puts `transformer.` before "
            "each name once more"
        ),
        way_out="`phlora export FILE OUT --to diffusers --base BASE`",
        source="run: loaders/lora_pipeline.py (QwenImageLoraLoaderMixin, ZImageLoraLoaderMixin)",
    ),
    Rule(
        name="differences",
        engines=("diffusers",),
        severity=WRONG,
        finds=lambda s: s.parts("diff", "set_weight"),
        message="drops what has no factors, such as norms, in silence (Wan), or refuses the file",
        way_out="`phlora export FILE OUT --to merged --base BASE`, and load that",
        source="run: loaders/lora_conversion_utils.py",
    ),
    Rule(
        name="loha",
        engines=("diffusers",),
        severity=REFUSED,
        finds=lambda s: s.called(".hada_"),
        message="refuses LoHa, whose deltas are products of two matrices element by element, or finds nothing in it",
        way_out="`phlora extract BASE BASE+FILE OUT --to diffusers --rank R`",
        source="run: loaders/lora_conversion_utils.py",
    ),
    Rule(
        name="lokr",
        engines=("diffusers",),
        severity=WARNING,
        finds=lambda s: s.called(".lokr_"),
        message="reads LoKr, whose deltas are Kronecker products, of Flux.2 and Z-Image alone",
        way_out="`phlora extract BASE BASE+FILE OUT --to diffusers --rank R`, for other models",
        source="read: loaders/lora_pipeline.py (ZImageLoraLoaderMixin, Flux2LoraLoaderMixin)",
    ),
    Rule(
        name="set-weight",
        engines=("a1111",),
        severity=WRONG,
        finds=lambda s: s.parts("set_weight"),
        message="knows no weights that take the place of the base's",
        way_out="`phlora export FILE OUT.safetensors --to comfyui --base BASE` writes differences",
        source="read: A1111's extensions-builtin/Lora/network_full.py",
    ),
    Rule(
        name="set-weight-strength",
        engines=("comfyui",),
        severity=WARNING,
        finds=lambda s: s.parts("set_weight"),
        message="puts such weights in the place of the base's whatever the strength, and over what other LoRAs added",
        way_out="`phlora export FILE OUT.safetensors --to comfyui --base BASE` writes differences",
        source=f"{_COMFY} (calculate_weight)",
    ),
    Rule(
        name="lora-bias",
        engines=("comfyui", "a1111"),
        severity=WRONG,
        finds=lambda s: s.parts("bias"),
        message="reads no summand of a bias by this name",
        way_out="`phlora export FILE OUT.safetensors --to comfyui --base BASE` writes `.diff_b`",
        source=_COMFY,
    ),
    Rule(
        name="bias-of-a-part",
        engines=("comfyui",),
        severity=WRONG,
        finds=of_parts,
        message="adds nothing to the bias of a module that it has fused with others or turned round: its key is lost",
        way_out="`phlora export FILE OUT.safetensors --to comfyui --base BASE` names the fused module",
        source=f"{_COMFY} (load_lora: the name of a bias is made of a weight's, which is no text there)",
    ),
)
