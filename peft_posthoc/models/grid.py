"""Names of weights to a grid of layers x modules, for tables and pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from peft_posthoc.models.order import index


class Cell(NamedTuple):
    """Where a weight is."""

    module: str
    """Its part in its layer, such as `q_proj`: the same word in every layer."""
    layer: int | None
    """None where it is in no numbered one, as the head."""


def cells(weights: Iterable[str]) -> dict[str, Cell]:
    """The place of every weight. The first number in a name is its layer's; others, such as an expert's, say nothing.

    A module's word is the last part of its name, and as much of the rest as tells it from others that end alike:
    `encoder.SelfAttention.q`.
    """
    numbers: dict[str, int | None] = {}
    paths: dict[str, tuple[str, ...]] = {}
    for weight in weights:
        parts = weight.removesuffix(".weight").split(".")
        numbers[weight] = next((number for part in parts if (number := index(part)) is not None), None)
        paths[weight] = tuple(part for part in parts if not part.isdecimal()) or tuple(parts)
    alike = defaultdict(set)
    for path in paths.values():
        alike[path[-1]].add(path)
    words = {path: _word(path, group) for group in alike.values() for path in group}
    return {weight: Cell(words[path], numbers[weight]) for weight, path in paths.items()}


def _word(path: tuple[str, ...], group: set[tuple[str, ...]]) -> str:
    def told(one: tuple[str, ...]) -> str:
        shared = set.intersection(*map(set, group))
        return ".".join([*(part for part in one[:-1] if part not in shared), one[-1]])

    # The same parts in another order: nothing less than the whole tells them apart.
    twins = [one for one in group if told(one) == told(path)]
    return told(path) if len(twins) == 1 else ".".join(path)
