"""Rules about the files of an adapter's folder, and about what its configuration must have."""

from __future__ import annotations

from peft_posthoc.serving.rules.rule import CONVERT, FIX, REFUSED, VLLM_HELPER, WARNING, WRITE_THEM, WRONG, Rule
from peft_posthoc.serving.subject import Subject

# What PEFT 0.6's LoraConfig takes; every version since knows these.
_OLD_KEYS = frozenset(
    {
        *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r"),
        *("target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save"),
        *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    }
)


def other_adapters(subject: Subject) -> tuple[str, ...]:
    """Other safetensors files in the folder with tensors that an engine would take for the adapter's."""
    return tuple(
        file for file, names in subject.others.items() if any(".lora_" in one or ".layers." in one for one in names)
    )


def unknown_keys(subject: Subject) -> tuple[str, ...]:
    """Keys that PEFT 0.6 does not know."""
    return tuple(sorted(key for key in subject.config if key not in _OLD_KEYS))


def pickled(subject: Subject) -> tuple[str, ...]:
    """The file with the weights, where it is a pickle."""
    return () if subject.weights_name.endswith(".safetensors") else (subject.weights_name,)


def float_alpha(subject: Subject) -> tuple[str, ...]:
    """`lora_alpha`, where it is no whole number."""
    alpha = subject.config.get("lora_alpha")
    return (f"lora_alpha={alpha}",) if isinstance(alpha, float) else ()


RULES: tuple[Rule, ...] = (
    # Files.
    Rule(
        name="pickled",
        engines=("lorax", "tgi"),
        severity=REFUSED,
        finds=pickled,
        message="reads safetensors only",
        way_out=FIX,
        source="read: LoRAX and TGI load *.safetensors of the folder",
    ),
    Rule(
        name="pickled-for-transformers",
        engines=("peft",),
        severity=WARNING,
        finds=pickled,
        message="`PeftModel` reads it; transformers' `load_adapter` raises FileNotFoundError for a local folder",
        way_out=FIX,
        source="run",
        versions="transformers 5.23.0",
    ),
    Rule(
        name="other-safetensors",
        engines=("sglang", "lorax", "tgi"),
        severity=WRONG,
        finds=other_adapters,
        message=(
            "loads every safetensors file of the folder, and takes what is called like factors or layers for the "
            "adapter's"
        ),
        way_out="move the others out of the folder; `--fix OUT` leaves them behind",
        source="read: SGLang's DefaultModelLoader; LoRAX, TGI",
    ),
    # What the configuration must have.
    Rule(
        name="no-peft-type",
        engines=("peft", "sglang"),
        severity=REFUSED,
        finds=lambda s: s.without("peft_type"),
        message="cannot tell what adapter it is",
        way_out=FIX,
        source="run: PEFT; SGLang raises KeyError (srt/lora/lora.py)",
    ),
    Rule(
        name="missing-keys",
        engines=("vllm", "sglang"),
        severity=REFUSED,
        finds=lambda s: s.without("r", "lora_alpha", "target_modules"),
        message="needs these keys in the configuration (ValueError in vLLM, KeyError in SGLang)",
        way_out=WRITE_THEM,
        source=f"run: {VLLM_HELPER}; SGLang's srt/lora/lora_config.py",
    ),
    Rule(
        name="missing-rank",
        engines=("trtllm",),
        severity=REFUSED,
        finds=lambda s: s.without("r", "lora_alpha"),
        message="needs these keys in the configuration",
        way_out=WRITE_THEM,
        source="read: tensorrt_llm/_torch/peft/lora/manager.py",
    ),
    Rule(
        name="missing-alpha",
        engines=("llamacpp",),
        severity=REFUSED,
        finds=lambda s: s.without("lora_alpha"),
        message=f"{CONVERT} needs it",
        way_out=WRITE_THEM,
        source=f"run: {CONVERT}",
    ),
    Rule(
        name="unknown-keys",
        engines=("peft",),
        severity=WARNING,
        finds=unknown_keys,
        message="PEFT 0.6 to 0.13 raises TypeError at keys that it does not know",
        way_out=FIX,
        source="peft #2275, textgen #6819, ms-swift #3141",
        versions="0.6 to 0.13",
    ),
    Rule(
        name="float-alpha",
        engines=("llamacpp",),
        severity=WARNING,
        finds=float_alpha,
        message="Ollama's own import of safetensors parses an unsigned integer",
        way_out=f"{FIX}; or give Ollama a GGUF",
        source="read: Ollama's convert/convert.go, git fb30760",
    ),
)
