"""Where a fine-tune's whole change is: the share of every module and layer, carried or not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft_posthoc.extraction.row import Row, energies
from peft_posthoc.models.grid import cells


@dataclass(frozen=True)
class Share:
    """What all modules that are called alike hold of the whole fine-tune's energy."""

    module: str
    layers: Mapping[int | None, float]
    """By layer; None is what is in no numbered one."""
    left_out: float
    """Of that, what the adapter has no form of."""

    @property
    def of_all(self) -> float:
        """In all layers together."""
        return math.fsum(self.layers.values())

    @property
    def fate(self) -> str:
        """What becomes of it, for people; nothing where it is carried."""
        return "" if not self.left_out else "carried in part" if self.left_out < 0.999 * self.of_all else "not carried"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        layers = {"other" if layer is None else str(layer): share for layer, share in self.layers.items()}
        return {"of_all": self.of_all, "left_out": self.left_out, "layers": layers}


def shares(rows: Iterable[Row]) -> tuple[Share, ...]:
    """What changed, those that hold most first. What has no delta counts as changed like the others."""
    rows = list(rows)
    names = {row.weight: row.weight.partition("[")[0] for row in rows}  # a part of a matrix is in the matrix's place
    places, of_each = cells(names.values()), energies(rows)
    everything = math.fsum(of_each.values())
    held: dict[str, dict[int | None, float]] = defaultdict(lambda: defaultdict(float))
    lost: dict[str, float] = defaultdict(float)
    for row in rows:
        if share := of_each[row.weight] / everything:
            module, layer = places[names[row.weight]]
            held[module][layer] += share
            lost[module] += share if row.status == "left out" else 0.0
    found = [Share(module, dict(layers), lost[module]) for module, layers in held.items()]
    return tuple(sorted(found, key=lambda share: -share.of_all))


def together(name: str, some: Iterable[Share]) -> Share:
    """Several under one name."""
    some = list(some)
    layers: dict[int | None, float] = defaultdict(float)
    for layer, share in (pair for one in some for pair in one.layers.items()):
        layers[layer] += share
    return Share(name, dict(layers), math.fsum(one.left_out for one in some))
