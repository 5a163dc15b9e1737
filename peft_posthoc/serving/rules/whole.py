"""Rules about tensors that are no factors: biases, norms, whole weights, copies of the base's."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from peft_posthoc.adapters.names import PREFIX, own_name
from peft_posthoc.serving.engines import ENGINES
from peft_posthoc.serving.rules.rule import (
    BOTH_READ,
    CONVERT,
    FIX,
    LEAVE_OUT,
    REFUSED,
    SGLANG_RUN,
    TRT_READ,
    VLLM_HELPER,
    WARNING,
    WRONG,
    Rule,
)
from peft_posthoc.serving.subject import Subject


def bias_setting(subject: Subject) -> tuple[str, ...]:
    """`bias`, unless it is "none"."""
    bias = subject.config.get("bias", "none")
    return () if bias == "none" else (f"bias={bias!r}",)


def in_layers(names: Iterable[str]) -> tuple[str, ...]:
    """The names that lie in numbered layers."""
    return tuple(name for name in names if ".layers." in name)


def overwriting(subject: Subject) -> tuple[str, ...]:
    """Norms, biases and whole weights that PEFT, not told of them by the configuration, writes over the base's."""
    biases = subject.biases if not bias_setting(subject) else ()
    names = (name for name in (*subject.norms, *biases, *subject.whole) if not subject.is_kept_whole(name))
    if subject.base is None:
        return tuple(names)
    return tuple(name for name in names if name.removeprefix(PREFIX) in subject.base.checkpoint.headers)


def incompletely_whole(subject: Subject) -> tuple[str, ...]:
    """Tensors, or modules, of the base that PEFT takes to be in the file whole, and which are not."""
    if subject.base is None:
        return ()
    if subject.in_peft is not None:
        return subject.in_peft.found.absent
    ends = subject.kept_whole()
    held = {name.removeprefix(PREFIX).rpartition(".")[0] for name in subject.headers}
    return tuple(
        module
        for module in subject.base.layout.classes
        if ends and module.endswith(ends) and not any(f"{own}.".startswith(f"{module}.") for own in held)
    )


def kept_norms(subject: Subject) -> tuple[str, ...]:
    """Norms that llama.cpp's converter knows by their names."""
    return tuple(name for name in subject.norms if "_layernorm" in name or ".norm" in name)


def other_norms(subject: Subject) -> tuple[str, ...]:
    """Norms that it does not know, such as `q_norm` and `ln_1`."""
    known = {*kept_norms(subject)}
    return tuple(name for name in subject.norms if name not in known)


def other_copies(subject: Subject) -> tuple[str, ...]:
    """Copies of the base's weights that are not the base's."""
    if subject.base is None:
        return ()
    headers, read = subject.base.checkpoint.headers, subject.base.checkpoint.read

    def differs(copy: str) -> bool:
        name = own_name(copy)
        if name not in headers:  # A tied head is stored as the embeddings.
            return False
        return not torch.equal(subject.weights.read(copy).float(), read(name).float())

    return tuple(copy for copy in subject.base_copies if differs(copy))


RULES: tuple[Rule, ...] = (
    # Biases.
    Rule(
        name="bias-setting",
        engines=("vllm",),
        severity=REFUSED,
        finds=bias_setting,
        message="supports no biases",
        way_out=FIX + ", without the biases, and tells their size",
        source=f"run: {VLLM_HELPER}",
    ),
    Rule(
        name="biases-ignored",
        engines=("lorax", "tgi"),
        severity=WRONG,
        finds=lambda s: s.biases,
        message="does not read biases",
        way_out=LEAVE_OUT,
        source=BOTH_READ,
    ),
    Rule(
        name="biases",
        engines=("vllm", "sglang", "trtllm", "llamacpp"),
        severity=REFUSED,
        finds=lambda s: s.biases,
        message="ends at tensors that are no factors",
        way_out=LEAVE_OUT,
        source=f"run: vLLM, {CONVERT}; {SGLANG_RUN}; {TRT_READ}",
    ),
    Rule(
        name="lora-bias",
        engines=("vllm", "sglang", "trtllm", "llamacpp"),
        severity=REFUSED,
        finds=lambda s: s.lora_biases or s.setting("lora_bias"),
        message="does not know `lora_bias`",
        way_out=LEAVE_OUT,
        source=f"run: {VLLM_HELPER}, {CONVERT}; SGLang puts it in the slot of B; {TRT_READ}",
    ),
    Rule(
        name="lora-bias-ignored",
        engines=("lorax", "tgi"),
        severity=WRONG,
        finds=lambda s: s.lora_biases,
        message="takes `lora_A` and `lora_B` only",
        way_out=LEAVE_OUT,
        source=BOTH_READ,
    ),
    # Whole weights.
    Rule(
        name="modules-to-save",
        engines=("vllm",),
        severity=REFUSED,
        finds=lambda s: s.kept_whole("classifier", "score"),
        message="supports `modules_to_save` for classifiers only",
        way_out=LEAVE_OUT,
        source=f"run: {VLLM_HELPER}",
    ),
    Rule(
        name="modules-to-save-missing",
        engines=("peft",),
        severity=REFUSED,
        finds=incompletely_whole,
        message="raises KeyError unless every module that `modules_to_save` means is in the file",
        way_out=LEAVE_OUT,
        source="run",
        needs_base=True,
    ),
    Rule(
        name="whole-weights",
        engines=("vllm", "llamacpp"),
        severity=REFUSED,
        finds=lambda s: s.whole,
        message="knows no whole weights in an adapter",
        way_out=LEAVE_OUT,
        source=f"run: vLLM (#9280), {CONVERT} (llama.cpp #11554, #9065)",
    ),
    Rule(
        name="whole-weights-ignored",
        engines=("sglang", "lorax", "tgi"),
        severity=WRONG,
        finds=lambda s: s.whole,
        message="does not load whole weights and serves the base's",
        way_out=LEAVE_OUT,
        source=f"{SGLANG_RUN}; {BOTH_READ}",
    ),
    Rule(
        name="whole-weights-sglang",
        engines=("sglang",),
        severity=REFUSED,
        finds=lambda s: in_layers(s.whole),
        message="takes whole weights of layers for factors, and ends at them (KeyError, or shapes that do not fit)",
        way_out=LEAVE_OUT,
        source=SGLANG_RUN,
    ),
    Rule(
        name="whole-weights-trtllm",
        engines=("trtllm",),
        severity=REFUSED,
        finds=lambda s: tuple(name for name in s.whole if "lm_head" not in name and "embed_tokens" not in name),
        message="ends at tensors that are no factors (KeyError)",
        way_out=LEAVE_OUT,
        source=TRT_READ,
    ),
    Rule(
        name="whole-head-trtllm",
        engines=("trtllm",),
        severity=WRONG,
        finds=lambda s: tuple(name for name in s.whole if "lm_head" in name or "embed_tokens" in name),
        message="skips them, but for the older TensorRT workflow",
        way_out=LEAVE_OUT,
        source=TRT_READ,
    ),
    Rule(
        name="overwrites-base",
        engines=("peft",),
        severity=WRONG,
        finds=overwriting,
        message="writes them over the base without a word: they stay with the adapter disabled, and for other adapters",
        way_out=LEAVE_OUT + "; or name them in `modules_to_save`",
        source="run",
    ),
    Rule(
        name="norms",
        engines=("vllm", "sglang", "trtllm"),
        severity=REFUSED,
        finds=lambda s: s.norms,
        message="refuses tensors of norms, as mergekit-extract-lora writes them",
        way_out=LEAVE_OUT,
        source=f"run: vLLM (vllm #6573); {SGLANG_RUN}; {TRT_READ}",
    ),
    Rule(
        name="norms-ignored",
        engines=("lorax", "tgi"),
        severity=WRONG,
        finds=lambda s: s.norms,
        message="ignores tensors of norms",
        way_out=LEAVE_OUT,
        source=BOTH_READ,
    ),
    Rule(
        name="norms-llamacpp",
        engines=("llamacpp",),
        severity=WRONG,
        finds=kept_norms,
        message="keeps norms in the GGUF and ignores them when it loads it",
        way_out=LEAVE_OUT,
        source=f"run: {CONVERT}, src/llama-adapter.cpp (llama.cpp PR #11131)",
    ),
    Rule(
        name="other-norms-llamacpp",
        engines=("llamacpp",),
        severity=REFUSED,
        finds=other_norms,
        message=f"{CONVERT} ends at norms whose names have neither _layernorm nor .norm in them",
        way_out=LEAVE_OUT,
        source=f"run: {CONVERT}",
    ),
    Rule(
        name="base-copies",
        engines=tuple(ENGINES),
        severity=WARNING,
        finds=lambda s: s.base_copies,
        message="PEFT saved the base's own weights beside the factors of embeddings: bytes that are of no use",
        way_out="`--fix OUT` leaves them out; or `save_pretrained(save_embedding_layers=False)`",
        source="run: PEFT",
    ),
    Rule(
        name="other-base-copies",
        engines=tuple(ENGINES),
        severity=WRONG,
        finds=other_copies,
        message=(
            "the file's copies of the base's weights are another base's: PEFT writes them over it, other engines do not"
        ),
        way_out="serve it on the base that it was made for",
        source="run",
        needs_base=True,
    ),
)
