"""Rules about adapters that compute something else than base + b @ a: DoRA, initial weights, other variants."""

from __future__ import annotations

from peft_posthoc.serving.rules.rule import (
    BOTH_READ,
    CONVERT,
    MERGE,
    REFUSED,
    SGLANG_RUN,
    TRT_READ,
    VLLM_HELPER,
    WARNING,
    WRONG,
    Rule,
)
from peft_posthoc.serving.subject import Subject

# Names of initial weights that PEFT takes out of the base when it loads the adapter, by their beginning.
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq")


def mutating_init(subject: Subject) -> tuple[str, ...]:
    """Initial weights that are taken out of the base."""
    init = subject.config.get("init_lora_weights")
    return (f"init_lora_weights={init!r}",) if str(init).lower().startswith(_MUTATING_INITS) else ()


def variants(subject: Subject) -> tuple[str, ...]:
    """Settings with which PEFT computes something else than base + b @ a, and that vLLM knows of."""
    return subject.setting("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")


RULES: tuple[Rule, ...] = (
    Rule(
        name="dora",
        engines=("vllm", "sglang"),
        severity=REFUSED,
        finds=lambda s: (*s.setting("use_dora"), *s.magnitudes),
        message="does not support DoRA",
        way_out=MERGE,
        source=f"run: {VLLM_HELPER}; {SGLANG_RUN} (`validate_new_adapter`)",
    ),
    Rule(
        name="dora-ignored",
        engines=("lorax", "tgi"),
        severity=WRONG,
        finds=lambda s: (*s.setting("use_dora"), *s.magnitudes),
        message="does not read DoRA's magnitudes and adds the factors alone",
        way_out=MERGE,
        source=BOTH_READ,
    ),
    Rule(
        name="dora-flag-gguf",
        engines=("llamacpp",),
        severity=WRONG,
        finds=lambda s: s.setting("use_dora") if not s.magnitudes else (),
        message="does not read `use_dora` and adds the factors alone",
        way_out=MERGE,
        source=f"run: {CONVERT}",
    ),
    Rule(
        name="dora-gguf",
        engines=("llamacpp",),
        severity=REFUSED,
        finds=lambda s: s.magnitudes,
        message=f"{CONVERT} ends at DoRA's magnitudes",
        way_out=MERGE,
        source=f"run: {CONVERT}",
    ),
    Rule(
        name="dora-trtllm",
        engines=("trtllm",),
        severity=WARNING,
        finds=lambda s: (*s.setting("use_dora"), *s.magnitudes),
        message="supports DoRA, but not for experts nor with FP8 adapters",
        way_out=MERGE,
        source="read: tensorrt_llm/_torch/peft/lora/manager.py",
    ),
    Rule(
        name="init-vllm",
        engines=("vllm",),
        severity=REFUSED,
        finds=mutating_init,
        message="refuses initial weights that PEFT takes out of the base when it loads them",
        way_out="convert it with PEFT's `save_pretrained(path_initial_model_for_weight_conversion=...)`",
        source=f"run: {VLLM_HELPER}",
        versions="0.32 and later",
    ),
    Rule(
        name="init-peft",
        engines=("peft",),
        severity=WARNING,
        finds=mutating_init,
        message=(
            "changes the base when it loads the adapter: right for one trained so, wrong for factors of a plain "
            "delta; "
            "with `pissa_niter_N` by random numbers, so that two loads differ"
        ),
        way_out=(
            "set `init_lora_weights` to true where the factors are a plain delta; else convert it as for vLLM, "
            "or keep it"
        ),
        source="run",
    ),
    Rule(
        name="init-ignored",
        engines=("sglang", "lorax", "tgi", "trtllm", "llamacpp"),
        severity=WRONG,
        finds=mutating_init,
        message="adds the factors to the whole base, from which PEFT first takes the initial ones",
        way_out="convert it with PEFT's `save_pretrained(path_initial_model_for_weight_conversion=...)`",
        source=f"run: llama.cpp; {SGLANG_RUN}; read: the others do not read `init_lora_weights`",
    ),
    Rule(
        name="variants",
        engines=("vllm",),
        severity=REFUSED,
        finds=variants,
        message="refuses kinds of LoRA that compute something else",
        way_out=MERGE,
        source=f"run: {VLLM_HELPER}",
        versions="0.32 and later",
    ),
    Rule(
        name="variants-ignored",
        engines=("sglang", "lorax", "tgi", "trtllm", "llamacpp"),
        severity=WRONG,
        finds=variants,
        message="does not read that the adapter computes something else than base + b @ a",
        way_out=MERGE,
        source=f"run: {CONVERT}; {SGLANG_RUN}; read: LoRAX's LoraConfig; {TRT_READ.removeprefix('read: ')}",
    ),
)
