"""Rules about bases that are quantised: which engines load them, and add factors to what they hold as codes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from peft_posthoc.serving.rules.rule import REFUSED, WARNING, Rule
from peft_posthoc.serving.subject import Subject

_NOT_IN_VLLM = ("bitsandbytes", "gguf", "hqq", "aqlm")
_NOT_IN_TGI = ("bitsandbytes", "gguf", "mxfp4", "nvfp4", "modelopt", "torchao", "hqq", "aqlm")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def in_format(*formats: str) -> Callable[[Subject], tuple[str, ...]]:
    """What finds the formats, of these, that the base holds weights in."""

    def finds(subject: Subject) -> tuple[str, ...]:
        held = {how.casefold() for how in subject.quantised.values()}
        return tuple(how for how in sorted(held) if any(one in how for one in formats))

    return finds


def fused_in_part(subject: Subject) -> tuple[str, ...]:
    """Modules that are quantised, and others that an engine makes one matrix of with them otherwise, or not."""
    held: dict[str, dict[str, str]] = defaultdict(dict)
    slots = subject.base.slots if subject.base is not None and subject.quantised else {}
    for module in slots:
        parent, _, leaf = module.rpartition(".")
        held[parent][leaf] = subject.quantised.get(module, "")
    return tuple(
        f"{parent}.{leaf}"
        for parent, leaves in held.items()
        for group in _FUSED
        if len({leaves[leaf] for leaf in group if leaf in leaves}) > 1
        for leaf in group
        if leaves.get(leaf)
    )


def experts(subject: Subject) -> tuple[str, ...]:
    """Experts with factors whose weights the base holds as codes."""
    coded = {module for module in subject.quantised if ".experts" in module}
    return (*subject.experts, *subject.fused_experts) if coded else ()


def experts_not_fp8(subject: Subject) -> tuple[str, ...]:
    """The same, where that is anything but FP8 of one scale for a tensor."""
    plain = all(how.rpartition(", ")[2] == "FP8" for how in subject.quantised.values())
    return () if plain else experts(subject)


def odd_rank_in_fp8(subject: Subject) -> tuple[str, ...]:
    """Modules with factors in FP8 whose rank is no multiple of 16."""
    return tuple(
        module
        for module, own in subject.modules.items()
        if subject.headers[own.a_name].dtype.itemsize == 1 and own.rank % 16
    )


def gptq_of_other_codes(subject: Subject) -> tuple[str, ...]:
    """The base's GPTQ, where it has zeros of its own for each group, or other codes than those of 4 and 8 bits."""
    config = (subject.base.checkpoint.config or {}) if subject.base is not None else {}
    said = config.get("quantization_config") or {}
    if said.get("quant_method") != "gptq":
        return ()
    bits, symmetric = said.get("bits"), bool(said.get("sym", True))
    return () if symmetric and bits in (4, 8) else (f"GPTQ, {bits} bits, {'' if symmetric else 'a'}symmetric",)


RULES: tuple[Rule, ...] = (
    Rule(
        name="format-vllm",
        engines=("vllm",),
        severity=REFUSED,
        finds=in_format(*_NOT_IN_VLLM),
        message="does not load this base: the format is none of its quantization methods",
        way_out=(
            "serve the base in another form (compressed-tensors, FP8, GPTQ, AWQ); for GGUF there is the package "
            "vllm-gguf-plugin, whose LoRA is not known here"
        ),
        source="read: vllm/model_executor/layers/quantization/__init__.py (QUANTIZATION_METHODS); vllm #39583",
        versions="0.33.0; read, since it does not run here",
        needs_base=True,
        of_base=True,
    ),
    Rule(
        name="gptq-vllm",
        engines=("vllm",),
        severity=REFUSED,
        finds=gptq_of_other_codes,
        message="loads GPTQ of symmetric codes of 4 and 8 bits alone",
        way_out="quantise the base again with `sym=True`, or serve it in another form (AWQ has zeros of its own)",
        source="run: vLLM 0.32.0 on a CPU, which loads the same model with symmetric codes",
        versions="0.32.0",
        needs_base=True,
        of_base=True,
    ),
    Rule(
        name="format-tgi",
        engines=("lorax", "tgi"),
        severity=REFUSED,
        finds=in_format(*_NOT_IN_TGI),
        message="reads no checkpoint in this format: bitsandbytes and HQQ are made from 16 bits as it loads",
        way_out="serve the 16-bit base (with `--quantize bitsandbytes-nf4`), or a GPTQ or AWQ form of it",
        source="read: TGI text_generation_server/utils/quantization.py; LoRAX lorax_server/layers/linear.py",
        needs_base=True,
        of_base=True,
    ),
    Rule(
        name="format-lorax",
        engines=("lorax",),
        severity=REFUSED,
        finds=in_format("compressed-tensors", "fp8"),
        message="reads no checkpoint in this format: FP8 is made from 16 bits as it loads",
        way_out="serve the 16-bit base, or a GPTQ or AWQ form of it",
        source="read: LoRAX lorax_server/layers/linear.py; lorax #671",
        needs_base=True,
        of_base=True,
    ),
    Rule(
        name="fused-in-part",
        engines=("vllm", "sglang"),
        severity=REFUSED,
        finds=fused_in_part,
        message="makes one matrix of q, k and v, and of gate and up: all of one must be quantised alike",
        way_out="quantise the base again with all of them on its list of what is left out, or none",
        source="read: is_layer_skipped in vLLM's layers/quantization/utils/quant_utils.py, and in SGLang's",
        needs_base=True,
    ),
    Rule(
        name="quantised-experts",
        engines=("vllm",),
        severity=WARNING,
        finds=experts,
        message=(
            "adds factors to quantised experts in its Marlin and Triton kernels alone, whatever faster ones it has: "
            "INT4, FP8, NVFP4 and MXFP4; others are refused. FP8 experts crashed in versions of mid-2026"
        ),
        way_out="where it refuses, extract without experts: attention alone is served on every base",
        source="read: vllm/model_executor/layers/fused_moe/experts (LoRAExpertsMixin); vllm #45101, #45265, #42629",
        versions="0.33.0; read, since it does not run here",
        needs_base=True,
    ),
    Rule(
        name="quantised-experts-sglang",
        engines=("sglang",),
        severity=WARNING,
        finds=experts,
        message=(
            "adds factors to experts of 4 bits with `--moe-runner-backend marlin` alone, and there to those of "
            "compressed-tensors and of ModelOpt's NVFP4"
        ),
        way_out="give it the flag; where it refuses, extract without experts",
        source="read: SGLang's srt/lora/layers.py (FusedMoEWithLoRA); sglang #21858, #25202",
        needs_base=True,
    ),
    Rule(
        name="quantised-experts-trtllm",
        engines=("trtllm",),
        severity=REFUSED,
        finds=experts_not_fp8,
        message="adds factors to experts in 16 bits, or in FP8 with one scale a tensor, and on CUTLASS alone",
        way_out="extract without experts",
        source="read: tensorrt_llm/_torch/peft/lora/validation.py (check_moe_lora_supported)",
        needs_base=True,
    ),
    Rule(
        name="fp8-rank-trtllm",
        engines=("trtllm",),
        severity=REFUSED,
        finds=odd_rank_in_fp8,
        message="takes factors in FP8 at ranks that are multiples of 16",
        way_out="write them in bfloat16; or round the rank up (`--round-to 16`)",
        source="read: TensorRT-LLM #16810",
    ),
)
