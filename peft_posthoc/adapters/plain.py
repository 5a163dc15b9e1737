"""Adapters that are more than the product of their factors, found by their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a configuration may say without changing what is added to the weights; all else must be unset.
_HARMLESS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config"),
    "exclude_modules",
    *("fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config"),
    *("lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type"),
    *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules"),
    *("target_parameters", "task_type", "use_rslora"),
}
_REASONS = {
    "use_dora": "DoRA also rescales the base's weights",
    "alora_invocation_tokens": "aLoRA is on for some tokens only",
    "use_qalora": "QALoRA pools what goes into its factors",
    "layer_replication": "it repeats layers of the base",
    "trainable_token_indices": "it also replaces rows of the embeddings",
    "ensure_weight_tying": "it ties factors of one module to another's",
}
# Those that leave the base as it is.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")


def not_plain(config: Mapping[str, Any]) -> str | None:
    """Why an adapter is more than base + scale * `b @ a`; None if it is not.

    Args:
        config: The content of its `adapter_config.json`.
    """
    method = config.get("peft_type", "LORA")
    if method != "LORA":
        return f"its configuration says `peft_type` {method!r}"
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        return (
            f"its configuration sets `init_lora_weights` to {start!r}, which takes a part away from the base that the "
            "adapter was trained beside. PEFT's `save_pretrained(path_initial_model_for_weight_conversion=...)` makes "
            "a plain one of it"
        )
    for key, value in config.items():
        if value and key not in _HARMLESS:
            return f"its configuration sets `{key}`{': ' if key in _REASONS else ''}{_REASONS.get(key, '')}"
    return None
