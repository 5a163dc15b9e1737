"""Rows of the account put together: by kind of module for those that are carried, by reason for those that are not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peft_posthoc.extraction.row import Row, energies, energy_of, is_unknown, left_out
from peft_posthoc.models.grid import cells


@dataclass(frozen=True)
class Carried:
    """What is carried of all modules that are called alike, such as every `q_proj`."""

    kind: str
    weights: int
    rank: int
    """The largest; 0 where they are whole."""
    least: int
    """The smallest rank."""
    energy: float | None
    """E_r of them together; None where they did not change."""
    of_all: float
    """Their deltas' share of the whole fine-tune's energy."""
    bytes: int

    @property
    def ranks(self) -> str:
        """In words."""
        if not self.rank:
            return "whole"
        return str(self.rank) if self.least == self.rank else f"{self.least} to {self.rank}"


@dataclass(frozen=True)
class Left:
    """What is left out for one reason."""

    reason: str
    tensors: int
    of_all: float
    """Share of the whole fine-tune's energy."""
    about: bool
    """Whether that is an estimate: of some of them there is no delta."""


def by_kind(rows: Iterable[Row]) -> tuple[Carried, ...]:
    """What is carried, in the order of the rows."""
    rows = list(rows)
    carried = [row for row in rows if row.status in ("extracted", "whole")]
    # An expert of a stack, or a part of a matrix, is a `NAME[0]`.
    places = cells(row.weight.partition("[")[0] for row in carried)
    groups: dict[str, list[Row]] = {}
    for row in carried:
        groups.setdefault(places[row.weight.partition("[")[0]].module, []).append(row)
    everything = sum(energies(rows).values())
    found = []
    for kind, group in groups.items():
        energy = sum(map(energy_of, group))
        kept = sum((row.energy or 0.0) * energy_of(row) for row in group)
        ranks = [row.rank for row in group]
        found.append(
            Carried(
                kind,
                len(group),
                max(ranks),
                min(ranks),
                kept / energy if energy else None,
                energy / everything,
                sum(row.bytes for row in group),
            )
        )
    return tuple(found)


def by_reason(rows: Iterable[Row]) -> tuple[Left, ...]:
    """What is left out, in the order of the rows."""
    return tuple(
        Left(why, len(group), share, any(map(is_unknown, group))) for why, (group, share) in left_out(rows).items()
    )
