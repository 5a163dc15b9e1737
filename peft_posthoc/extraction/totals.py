"""Sums over all rows of a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peft_posthoc.extraction.meaning import norms
from peft_posthoc.extraction.row import Row, energies, energy_of, is_of_tuned, is_unknown, values
from peft_posthoc.text import share_of_all


@dataclass(frozen=True)
class Totals:
    """Sums over all rows; shares are weighted by energy."""

    energy: float
    """Kept, as a share of the energy of the deltas that were factored: the paper's E_r for the whole model."""
    energy_of_all: float
    """Kept, as a share of the energy of every delta, left-out ones included. What has no delta (`unknown`) counts as
    changed like the other values."""
    energy_at: Mapping[int, float]
    """`energy` for the powers of two below `rank`, if the adapter were cut to them."""
    relative_error: float
    relative_delta: float | None
    rank: int
    """The largest that a layer keeps."""
    file_rank: int
    """`r` of the file: what all are padded to in the portable form, what most have in the `peft` form."""
    bytes: int
    padding: int
    """Of these bytes, zeros that bring layers to the file's one rank, or stand for unchanged layers: none in the `peft`
    form."""
    seconds: float
    extracted: int
    whole: int
    """Kept without factors: norms, biases and the like, in the `peft` form."""
    unchanged: int
    left_out: int
    unknown: float = 0.0
    """Of the fine-tune's values, the share in tensors with nothing in base to compare them with."""
    grid: tuple[float, float] | None = None
    """`||error||` that the grids of base and tuned are expected to have put on the deltas, where one is quantised."""
    served_error: float | None = None
    """`||served - base||`, where the adapter is served on another form of the base."""
    served_delta: float | None = None
    """`||tuned - served||`."""

    @property
    def of_all(self) -> str:
        """For people: `energy_of_all`, and how far it is known."""
        return share_of_all(self.energy_of_all, self.unknown)


def totals_of(rows: Iterable[Row], file_rank: int, padding: int) -> Totals:
    """Add up.

    Args:
        rows: Of every tensor.
        file_rank: `r` of the file.
        padding: Bytes of zeros in it.
    """
    rows = list(rows)
    extracted = [row for row in rows if row.status == "extracted"]
    kept = sum((row.energy or 0.0) * energy_of(row) for row in extracted)
    carried = sum(map(energy_of, extracted))
    whole_energy = sum(energies(rows).values())
    whole = sum(energy_of(row) for row in rows if row.status == "whole")
    # Beyond its own rank a layer holds what it holds.
    at = {
        rank: sum((row.energy_at.get(rank, row.energy) or 0.0) * energy_of(row) for row in extracted)
        for rank in powers_below(max(row.rank for row in rows))
    }
    # Of matrices only: norms and biases are few and would hide a wrong base.
    matrices = [row for row in rows if len(row.shape) > 1 and row.relative_delta is not None]
    moved = math.sqrt(sum(map(energy_of, matrices)))
    return Totals(
        energy=kept / carried if carried else 1.0,
        energy_of_all=(kept + whole) / whole_energy,
        energy_at={rank: held / carried for rank, held in at.items() if carried},
        relative_error=math.sqrt(max(0.0, 1 - kept / carried)) if carried else 0.0,
        relative_delta=ratio(moved, math.sqrt(sum((row.base_norm or 0.0) ** 2 for row in matrices))),
        rank=max((row.rank for row in rows), default=0),
        file_rank=file_rank,
        bytes=sum(row.bytes for row in rows),
        padding=padding,
        seconds=sum(row.seconds for row in rows),
        extracted=len(extracted),
        whole=sum(row.status == "whole" for row in rows),
        unchanged=sum(row.status == "unchanged" for row in rows),
        left_out=sum(row.status == "left out" for row in rows),
        unknown=values(row for row in rows if is_unknown(row)) / values(row for row in rows if is_of_tuned(row)),
        **norms(rows),
    )


def powers_below(rank: int) -> list[int]:
    """The lower ranks of which energies are told."""
    return [2**i for i in range(max(rank - 1, 0).bit_length())]


def ratio(part: float | None, whole: float | None) -> float | None:
    """The share, where both are known."""
    return part / whole if part is not None and whole else None
