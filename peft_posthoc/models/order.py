"""The order of weights in their model: what people compare layers by, and files do not keep."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft_posthoc.models.layout import Layout

# Where no class was asked; "" is whatever else.
_PARTS = (
    *("wte", "wpe", "embed_tokens", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
    *("mlp", "gate_proj", "up_proj", "down_proj", "", "input_layernorm", "post_attention_layernorm", "norm", "lm_head"),
)

_DIGITS = 18  # What 64 bits hold. Python reads 4300 and no more.


def in_order(names: Iterable[str], layout: Layout) -> list[str]:
    """The weights as the model's class has its modules, or as names tell; layer 2 before layer 10 in either case."""
    known = {module: index for index, module in enumerate(layout.classes)} if any(layout.classes.values()) else {}

    def place(name: str) -> tuple[object, ...]:
        module = own = layout.module_of(name)
        while own and own not in known:
            own = own.rpartition(".")[0]
        parts = tuple(_key(part) for part in module.split(".")) if own != module else ()
        return known.get(own, len(known)), parts, not layout.name_of(name).endswith(".weight"), natural(name)

    return sorted(names, key=place)


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts numbers in names as numbers."""
    parts = ((index(part), part) for part in re.split(r"(\d+)", name))
    return tuple((-1, part) if number is None else (number, "") for number, part in parts)


def index(part: str) -> int | None:
    """The number that a part of a name is; None if it is a word, or digits that can count nothing."""
    return int(part) if part.isdecimal() and len(part) <= _DIGITS else None


def _key(part: str) -> tuple[int, tuple[tuple[int, str], ...]]:
    """Of one part of a name between dots."""
    return _PARTS.index(part if part in _PARTS else ""), natural(part)
