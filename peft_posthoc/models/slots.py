"""The modules of a model that could hold factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.models.kinds import LayerKind
from peft_posthoc.models.layout import Layout


class Slot(NamedTuple):
    """A module that an adapter may hold factors for: `b` is m x r, `a` is r x n."""

    kind: LayerKind
    m: int
    n: int


def slots_of(headers: Mapping[str, Header], layout: Layout) -> dict[str, Slot]:
    """Every module that could hold factors, by the shapes of the tensors."""
    slots: dict[str, Slot] = {}
    for name, header in headers.items():
        for place in layout.places(name):
            size = place.kind.size(header.shape)
            if size is not None and 0 not in size:
                slots[place.module] = Slot(place.kind, *size)
    return slots
