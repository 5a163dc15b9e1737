"""What `adapter_config.json` says of an adapter whose scale is one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def adapter_config(
    rank: int,
    targets: Sequence[str],
    *,
    base: object,
    revision: object,
    task_type: object,
    fan_in_fan_out: bool,
    whole: Collection[str] = (),
    stacked: Collection[str] = (),
    ranks: Mapping[str, int] | None = None,
    lora_bias: bool | None = None,
) -> dict[str, Any]:
    """The configuration of an adapter with `lora_alpha` equal to its rank, in the keys that all versions of PEFT know.

    Args:
        rank: Of the file.
        targets: The modules that have factors.
        base: What the base is called.
        revision: Its commit.
        task_type: What PEFT calls the base's task.
        fan_in_fan_out: Whether layers are stored the other way round (transformers' Conv1D).
        whole: Modules that are in the file whole.
        stacked: Parameters of stacked experts that have factors; PEFT 0.19 is the first to know the key.
        ranks: Other ranks, by the regular expression that modules' names end in; None where the form has no such keys.
        lora_bias: Whether something is added to biases; None where the form has no such key.
    """
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": list(whole) or None,
        "peft_type": "LORA",
        "r": rank,
        "revision": revision,
        "target_modules": list(targets),
        "task_type": task_type,
    }
    if stacked:
        config["target_parameters"] = list(stacked)
    if ranks is not None:
        config |= {"alpha_pattern": dict(ranks), "rank_pattern": dict(ranks)}
    if lora_bias is not None:
        config["lora_bias"] = lora_bias
    return config
