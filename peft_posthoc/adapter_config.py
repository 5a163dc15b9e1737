"""`adapter_config.json`: written for an adapter whose scale is one, and read whoever wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_posthoc.errors import AdapterError
from peft_posthoc.peft_format import CONFIG
from peft_posthoc.regular import regular

_TYPES: Mapping[str, tuple[type, ...]] = {
    "alpha_pattern": (dict, type(None)),
    "bias": (str,),
    "exclude_modules": (list, str, type(None)),
    "lora_alpha": (int, float),
    "modules_to_save": (list, type(None)),
    "r": (int,),
    "rank_pattern": (dict, type(None)),
    "target_modules": (list, str, type(None)),
    "target_parameters": (list, type(None)),
}


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


def read_config(where: Path) -> dict[str, Any]:
    """What the configuration in an adapter folder says.

    Raises:
        AdapterError: It is not readable, not a LoRA adapter's, or sets a key to what is no value for it.
    """
    path = where / CONFIG
    try:
        config = json.loads(regular(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"`{path}` is not a readable configuration of an adapter: {reason}.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"`{path}` is not a configuration: expected a JSON object.")
    kind = config.get("peft_type") or "LORA"
    if str(kind).upper() != "LORA":
        raise AdapterError(f"`{where}` is a {kind} adapter; only LoRA adapters are known here.")
    for key, types in _TYPES.items():
        value = config.get(key, types[0]())
        if not isinstance(value, types) or isinstance(value, bool):
            raise AdapterError(f"`{path}` sets `{key}` to {value!r}, which is no value for it.")
    if config.get("r", 8) < 1:
        raise AdapterError(f"`{path}` sets `r` to {config['r']}; a rank is at least 1.")
    for key in ("target_modules", "exclude_modules"):
        _compiled(config.get(key) or "", key, path)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (config.get(key) or {}).items():
            _compiled(pattern, key, path)
            if not isinstance(value, int | float) or isinstance(value, bool) or (key == "rank_pattern" and value < 1):
                raise AdapterError(f"`{key}` of `{path}` gives `{pattern}` the value {value!r}.")
    return config


def _compiled(pattern: Any, key: str, path: Path) -> None:
    try:
        re.compile(pattern if isinstance(pattern, str) else "")
    except re.error as error:
        raise AdapterError(f"`{key}` of `{path}` holds `{pattern}`, no regular expression: {error}.") from error
