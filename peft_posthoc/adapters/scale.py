"""The rank that PEFT gives a module, and the number that it multiplies the module's factors with."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from peft_posthoc.adapters.config import by_pattern

# PEFT's defaults, for configurations that do not say.
_RANK, _ALPHA = 8, 8


class Setting(NamedTuple):
    """Rank and scale of one module or parameter."""

    rank: int
    scale: float


def rank_of(config: Mapping[str, Any]) -> int:
    """The configuration's `r`."""
    return int(config.get("r", _RANK))


def alpha_of(config: Mapping[str, Any]) -> float:
    """The configuration's `lora_alpha`."""
    return float(config.get("lora_alpha", _ALPHA))


def settings(config: Mapping[str, Any], names: Collection[str], where: object) -> dict[str, Setting]:
    """Ranks and scales by module or parameter.

    Args:
        config: The adapter's.
        names: Of modules and parameters, without PEFT's prefix.
        where: The adapter, for messages.

    Raises:
        AdapterError: A pattern takes too long.
    """
    ranks, alphas = (by_pattern(config, key, names, where) for key in ("rank_pattern", "alpha_pattern"))
    found = {}
    for name in names:
        rank, alpha = ranks.get(name, rank_of(config)), float(alphas.get(name, alpha_of(config)))
        found[name] = Setting(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return found


def parameters_of(module: str, config: Mapping[str, Any]) -> list[str]:
    """The parameters of stacked experts that a module's factors may be for (`target_parameters`), by full names."""
    owner = module.replace(".base_layer", "")
    found = [str(target).rpartition(".") for target in config.get("target_parameters") or ()]
    return [f"{owner}.{leaf}" for parent, _, leaf in found if owner == parent or owner.endswith(f".{parent}")]
