"""Something beside tensors in which two states of one model differ. No adapter carries it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

# Characters of a value that people read.
_SHOWN = 60


@dataclass(frozen=True)
class Difference:
    """One setting, of the configuration, the tokenizer or the generation of text."""

    of: Literal["configuration", "tokenizer", "generation"]
    key: str
    """Of a model within the model: `text_config.rope_parameters`."""
    base: Any
    """Its value there; null where it has none."""
    tuned: Any
    told: str
    """For people."""
    material: bool = True
    """Whether the same tokens, or the same words, lead to other outputs; else it is a limit, a default or a name."""

    @classmethod
    def between(
        cls,
        of: Literal["configuration", "tokenizer", "generation"],
        key: str,
        base: Any,
        tuned: Any,
        *,
        material: bool = True,
    ) -> Self:
        """The difference of two values, told as the parts of them that differ."""
        told = ", ".join(f"`{name}` {_shown(one)} -> {_shown(other)}" for name, one, other in _parts(key, base, tuned))
        return cls(of, key, _plain(base), _plain(tuned), told, material)


def alike(base: Any, tuned: Any) -> bool:
    """Whether two values say the same: what is absent, null, false or empty does, and a number in any spelling."""
    if isinstance(base, Mapping) and isinstance(tuned, Mapping):
        return all(alike(base.get(key), tuned.get(key)) for key in base.keys() | tuned.keys())
    if isinstance(base, list | tuple) and isinstance(tuned, list | tuple):
        return len(base) == len(tuned) and all(map(alike, base, tuned))
    if isinstance(base, int | float) and isinstance(tuned, int | float):
        return math.isclose(base, tuned, rel_tol=1e-6)  # 1e-6 comes back as 9.99999997e-07 from float32
    return base == tuned or (_says_nothing(base) and _says_nothing(tuned))


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | tuple | Mapping) and not value)


def _parts(key: str, base: Any, tuned: Any) -> list[tuple[str, Any, Any]]:
    if not (isinstance(base, Mapping) and isinstance(tuned, Mapping)):
        return [(key, base, tuned)]
    names = [name for name in {**base, **tuned} if not alike(base.get(name), tuned.get(name))]
    return [part for name in names for part in _parts(f"{key}.{name}", base.get(name), tuned.get(name))]


def _shown(value: Any) -> str:
    text = "none" if value is None else json.dumps(_plain(value), ensure_ascii=False).replace("`", "'")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _plain(value: Any) -> Any:
    """A value that JSON has: infinity, and whatever a class keeps in its configuration, as text."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value
