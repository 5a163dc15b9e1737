"""`adapter_config.json`: written for an adapter whose scale is one, and read whoever wrote it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft_posthoc.errors import AdapterError
from peft_posthoc.json_file import read_json
from peft_posthoc.patterns import PatternError, check_patterns, first_matches, matched, replaced

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
"""The file that PEFT once wrote instead."""
# No weight has as many rows.
_LARGEST_RANK = 2**31 - 1


def adapter_config(
    rank: int,
    targets: Sequence[str],
    *,
    base: object,
    revision: object,
    task_type: object,
    auto_mapping: Mapping[str, Any] | None,
    fan_in_fan_out: bool,
    bias: str = "none",
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
        auto_mapping: What its auto classes find the base's class by, where there is no task.
        fan_in_fan_out: Whether layers are stored the other way round (transformers' Conv1D).
        bias: Which biases of the base are in the file, as PEFT's `bias`.
        whole: Modules that are in the file whole.
        stacked: Parameters of stacked experts that have factors; PEFT 0.19 is the first to know the key.
        ranks: Other ranks, by the regular expression that modules' names end in; None where the form has no such keys.
        lora_bias: Whether something is added to biases; None where the form has no such key.
    """
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "bias": bias,
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
    if auto_mapping:
        config["auto_mapping"] = dict(auto_mapping)
    if stacked:
        config["target_parameters"] = list(stacked)
    if ranks is not None:
        config |= {"alpha_pattern": dict(ranks), "rank_pattern": dict(ranks)}
    if lora_bias is not None:
        config["lora_bias"] = lora_bias
    return config


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_RANK


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _are_names_or_pattern(value: Any) -> bool:
    return isinstance(value, str) or _are_names(value)


def _are_layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(one, int) and not isinstance(one, bool) for one in numbers)


def _by_pattern(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(check, value.values())))


# By key, what is a value for it. Keys that are not here are told by `plain`, or mean nothing for what is computed.
_VALUES: Mapping[str, Callable[[Any], bool]] = {
    "alpha_pattern": _by_pattern(_is_number),
    "bias": lambda value: isinstance(value, str),
    "exclude_modules": _are_names_or_pattern,
    "fan_in_fan_out": _is_flag,
    "init_lora_weights": lambda value: _is_name(value) or isinstance(value, bool),
    "layers_pattern": _are_names_or_pattern,
    "layers_to_transform": _are_layers,
    "lora_alpha": _is_number,
    "lora_bias": _is_flag,
    "modules_to_save": _are_names,
    "peft_type": _is_name,
    "r": _is_rank,
    "rank_pattern": _by_pattern(_is_rank),
    "revision": _is_name,
    "target_modules": _are_names_or_pattern,
    "target_parameters": _are_names,
    "task_type": _is_name,
    "use_rslora": _is_flag,
}


def read_config(where: Path) -> dict[str, Any]:
    """The configuration in an adapter folder: the one reader of it, whoever wrote it.

    Raises:
        AdapterError: It is not readable, not a LoRA adapter's, or sets a key to what is no value for it.
    """
    if not (where / CONFIG).exists():
        what = f"has no {CONFIG}" if where.is_dir() else "is no folder" if where.exists() else "does not exist"
        raise _unreadable(where, f"it {what}. Give the folder of a PEFT adapter")
    try:
        config = read_json(where / CONFIG, unique=True)
    except ValueError as error:
        raise _unreadable(where, f"its {CONFIG} is not a readable configuration: {error}") from error
    if not isinstance(config, dict):
        raise _unreadable(where, f"its {CONFIG} is no JSON object")
    kind = config.get("peft_type") or "LORA"
    if str(kind).upper() != "LORA":
        raise _unreadable(where, f"its configuration says `peft_type` {kind!r}; only LoRA adapters are known here")
    for key, fits in _VALUES.items():
        if key in config and not fits(config[key]):
            raise _unreadable(where, f"its configuration {_no_value(key, config[key], fits)}")
    for key, patterns in patterns_of(config).items():
        with _wording(key, where):
            check_patterns(patterns)
    return config


def _unreadable(where: Path, why: str) -> AdapterError:
    return AdapterError(f"`{where}` is not a readable LoRA adapter: {why}.")


def _no_value(key: str, value: Any, fits: Callable[[Any], bool]) -> str:
    if key == "r" and isinstance(value, int) and not isinstance(value, bool):
        return f"sets `r` to {value}; a rank is at least 1, and at most {_LARGEST_RANK}"
    if isinstance(value, dict) and key.endswith("_pattern"):
        pattern, own = next((pattern, own) for pattern, own in value.items() if not fits({pattern: own}))
        return f"gives `{pattern}` in `{key}` the value {own!r}"
    return f"sets `{key}` to {value!r}, which is no value for it"


def patterns_of(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The values that PEFT reads as regular expressions, by key."""
    found = {key: list(config.get(key) or ()) for key in ("rank_pattern", "alpha_pattern", "modules_to_save")}
    found |= {key: [config[key]] for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), str)}
    layers = config.get("layers_pattern") or []
    return found | {"layers_pattern": [layers] if isinstance(layers, str) else layers}


def by_pattern(config: Mapping[str, Any], key: str, names: Iterable[str], where: object) -> dict[str, Any]:
    """The value that `rank_pattern` or `alpha_pattern` gives each of these names that a pattern matches.

    Raises:
        AdapterError: A pattern takes too long.
    """
    own = config.get(key) or {}
    with _wording(key, where):
        return {name: own[pattern] for name, pattern in first_matches(own, names).items()}


def meant(config: Mapping[str, Any], key: str, names: Collection[str], where: object) -> set[str]:
    """The names that `target_modules` or `exclude_modules` means: a list of ends, or a regular expression.

    Raises:
        AdapterError: The pattern takes too long.
    """
    target = config.get(key)
    if not isinstance(target, str):
        ends = tuple(f".{name}" for name in target or ())
        return {name for name in names if f".{name}".endswith(ends)}
    with _wording(key, where):
        return matched(target, names, "fullmatch")


def in_layers_named(config: Mapping[str, Any], names: Collection[str], where: object) -> set[str]:
    """The names of modules in a layer that `layers_to_transform` names; all, where it names none.

    Raises:
        AdapterError: A pattern takes too long.
    """
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if layers is None or layers == []:
        return set(names)
    inside = "|".join([patterns] if isinstance(patterns, str) else patterns) or "[^.]*"
    listed, wanted = list(names), {str(layer) for layer in (layers if isinstance(layers, list) else [layers])}
    with _wording("layers_pattern", where, inside):
        # The first number that there is, as PEFT 0.21 has it.
        made = replaced(rf"(?s)\A.*?\.(?:{inside})\.(?P<layer>\d+)\..*\Z", r"=\g<layer>", listed)
    return {name for name, own in zip(listed, made, strict=True) if own[:1] == "=" and _number(own[1:]) in wanted}


def _number(digits: str) -> str:
    return digits.lstrip("0") or "0"


def try_patterns(config: Mapping[str, Any], names: Collection[str], where: object) -> None:
    """See before PEFT does whether its patterns take too long for the names of a model's modules: PEFT would wait.

    Raises:
        AdapterError: One of them takes too long.
    """
    for key in ("rank_pattern", "alpha_pattern"):
        by_pattern(config, key, names, where)
    for key in ("target_modules", "exclude_modules"):
        meant(config, key, names, where)
    in_layers_named(config, names, where)
    for name in config.get("modules_to_save") or ():
        with _wording("modules_to_save", where, name):
            matched(rf"(^|.*\.){name}($|\..*)", names, "match")


@contextmanager
def _wording(key: str, where: object, pattern: str | None = None) -> Iterator[None]:
    """Word the error of a pattern as one of the adapter's configuration.

    Args:
        key: In the configuration.
        where: The adapter.
        pattern: The pattern as the configuration has it, if another one is tried.

    Raises:
        AdapterError: The pattern is none, or takes too long.
    """
    try:
        yield
    except PatternError as error:
        problem = error.problem.replace("is not a regular expression", "is no regular expression")
        raise AdapterError(f"`{key}` of `{where}` holds `{pattern or error.pattern}`, which {problem}.") from error
