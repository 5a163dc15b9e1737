"""Names in the LoRA files of image models: the tensor's part in a module, the component, and the module's own name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from peft_posthoc.models.original import PREFIXES
from peft_posthoc.models.original_modules import as_loaded, parts_of

_PARTS = {
    "down": r"\.lora_down(\.weight)?|(\.|_)lora\.down\.weight|\.lora_A(\.default)?\.weight|"
    r"\.lora_linear_layer\.down\.weight",
    "up": r"\.lora_up(\.weight)?|(\.|_)lora\.up\.weight|\.lora_B(\.default)?\.weight|\.lora_linear_layer\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "bias": r"\.lora_B(\.default)?\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.diff|\.w_norm",
    "diff_b": r"\.diff_b|\.b_norm",
    "set_weight": r"\.set_weight",
}
_PART = re.compile("(?P<module>.+?)(?:" + "|".join(f"(?P<{name}>{part})" for name, part in _PARTS.items()) + ")")
# By the beginning of a name; the first that fits.
_COMPONENTS = (
    (r"(lora|lycoris)_unet_", "denoiser", True),
    (r"lora_te1?_", "text_encoder", True),
    (r"lora_te2_", "text_encoder_2", True),
    (r"lora_te3_", "text_encoder_3", True),
    (r"(lora_transformer|lycoris)_", "denoiser", True),
    (r"text_encoders\.clip_[lh]\.transformer\.", "text_encoder", False),
    (r"text_encoders\.clip_g\.transformer\.", "text_encoder_2", False),
    (r"text_encoders\.t5xxl\.transformer\.", "text_encoder_3", False),
    (r"(unet|transformer|diffusion_model)\.", "denoiser", False),
    (r"(transformer_2|text_encoder(_\d)?)\.", "", False),
)
# Parts of modules' names that have underscores of their own, in diffusers, transformers and the originals.
_WORDS = """
down_blocks up_blocks mid_block transformer_blocks single_transformer_blocks to_q to_k to_v to_out proj_in proj_out
conv_in conv_out conv_shortcut conv_norm_out time_emb_proj time_embedding add_embedding class_embedding linear_1
linear_2 text_model self_attn cross_attn q_proj k_proj v_proj out_proj text_projection token_embedding
position_embedding layer_norm1 layer_norm2 final_layer_norm add_q_proj add_k_proj add_v_proj to_add_out ff_context
norm1_context img_mlp txt_mlp img_mod txt_mod proj_mlp norm_q norm_k norm_added_q norm_added_k x_embedder
context_embedder time_text_embed timestep_embedder guidance_embedder text_embedder img_in txt_in txt_norm norm_out
input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection time_embed label_emb
noise_refiner context_refiner feed_forward double_blocks single_blocks joint_blocks x_block context_block img_attn
txt_attn
"""
_WORD = re.compile("|".join([*sorted(map(re.escape, _WORDS.split()), key=len, reverse=True), "[^_]+"]))
# The UNets of Stable Diffusion by the names of their first code, without the numbers of blocks.
_SGM = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_SGM_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_BLOCK = re.compile(r"(?P<side>input_blocks|output_blocks)\.(?P<block>\d{1,3})\.(?P<inner>[0-2])\.(?P<rest>.+)")


class Named(NamedTuple):
    """What the name of a tensor says."""

    component: str
    """`denoiser` for the UNet or the transformer, or as diffusers calls it."""
    module: str
    """As it is called there."""
    underscored: bool
    """Whether the dots in its name were made underscores."""
    part: str
    original: bool
    """Whether it may be its author's name, not that of diffusers."""

    @property
    def flat(self) -> str:
        """The module's name with underscores for dots."""
        return self.module.replace(".", "_")

    @property
    def flat_names(self) -> tuple[str, ...]:
        """That, and what transformers may call it: some of its text encoders are not in a `text_model`."""
        within = self.flat.removeprefix("text_model_")
        return (self.flat, within) if self.component.startswith("text_encoder") else (self.flat,)

    def is_called(self, original: str) -> bool:
        """Whether it is an author's module of this name."""
        return self.flat == original.replace(".", "_")

    def modules(self, family: str | None) -> tuple[str, ...]:
        """By diffusers' names, those whose rows it has one below the other.

        Args:
            family: The class that it is of by its author's names (`original_modules.family_of`), if it is.
        """
        if family and self.original and (parts := parts_of(self.module, family, self.underscored)):
            return parts
        dotted = ".".join(_WORD.findall(self.module)) if self.underscored else self.module
        # Attention's own names in files of diffusers before 0.20.
        dotted = re.sub(r"\.processor\.(to_\w+)", r".\1", dotted)
        if not dotted.startswith("single_transformer_blocks"):  # Flux.2 has it by that name.
            dotted = re.sub(
                r"\.(to_out|attention\.out)$", lambda old: f".{old[1].replace('.out', '.to_out')}.0", dotted
            )
        return (of_sgm(dotted),)


def read_name(name: str) -> Named | None:
    """What a tensor's name says; None where it is no part of a LoRA that is known."""
    found = _PART.fullmatch(name)
    if found is None:
        return None
    part = next(key for key in _PARTS if found[key] is not None)
    for pattern, component, underscored in _COMPONENTS:
        if start := re.match(pattern, found["module"]):
            module = found["module"][start.end() :]
            original = component == "denoiser" and not (
                start[0] in ("unet.", "transformer.") and not module.startswith(("double_blocks", "single_blocks"))
            )
            return Named(component or start[0].removesuffix("."), module, underscored, part, original)
    return None


def of_model(names: Iterable[str]) -> dict[str, str]:
    """The modules and parameters of a model, by their names, and ComfyUI's, with underscores for dots."""
    names = list(names)
    prefix = next((one for one in PREFIXES if any(name.startswith(one) for name in names)), "")
    own = {re.sub(r"\.(weight|bias|scale)$", "", name) for name in names if name.startswith(prefix)}
    found = {as_loaded(name.removeprefix(prefix), names).replace(".", "_"): name for name in own}
    return found | {name.removeprefix(prefix).replace(".", "_"): name for name in own}


def of_sgm(module: str) -> str:
    """Diffusers' name of a module of a UNet that may be called as its first code does; of three layers a block."""
    if module in _SGM_ENDS:
        return _SGM_ENDS[module]
    if middle := re.fullmatch(r"middle_block\.(\d)\.(.+)", module):
        at = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}.get(middle[1], middle[1])
        return f"mid_block.{at}.{_SGM.get(middle[2], middle[2])}"
    if (found := _BLOCK.fullmatch(module)) is None:
        return module
    down, inner, rest = found["side"] == "input_blocks", int(found["inner"]), found["rest"]
    block, layer = divmod(int(found["block"]) - down, 3)
    if block < 0 or (inner == 2 and rest != "conv"):
        return module
    if rest in ("op", "conv"):
        return f"{'down' if down else 'up'}_blocks.{block}.{'down' if down else 'up'}samplers.0.conv"
    return (
        f"{'down' if down else 'up'}_blocks.{block}.{('resnets', 'attentions')[inner]}.{layer}.{_SGM.get(rest, rest)}"
    )
