"""A row of the account for every tensor, and what each is of the whole fine-tune."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft_posthoc.extraction.reasons import Reason


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor."""

    weight: str
    status: Literal["extracted", "whole", "unchanged", "left out"]
    reason: str = ""
    """Why it is not carried; empty where it is."""
    modules: tuple[str, ...]
    """Where PEFT adapts it."""
    shape: tuple[int, ...]
    dtype: str
    rank: int = 0
    """Singular triplets kept."""
    energy: float | None
    """E_r (PHLoRA, eq. 5): the share of the delta's energy that is kept."""
    energy_at: Mapping[int, float] = field(default_factory=dict)
    """The same for the powers of two below the kept rank, if the adapter were cut to them."""
    relative_error: float | None
    """`||delta - b @ a|| / ||delta||`, before rounding to the saved dtype."""
    delta_norm: float | None
    base_norm: float | None
    tuned_norm: float | None = None
    """Only where there is no delta to take."""
    relative_delta: float | None
    """`||delta|| / ||base||`."""
    bytes: int
    """In the adapter file."""
    seconds: float
    shortfall: float | None = None
    """The certificate of the factorization: energy missed against the best rank-r approximation, relative."""
    residual: float | None = None
    """Of the worst kept triplet, `||delta v - sigma u||` relative to the largest sigma."""
    noise: float | None = None
    """The share of the delta's energy that rounding to the saved type can account for, at most. None where it was not
    measured (`--rank auto` does), or the type does not tell."""
    signal_rank: int | None = None
    """How many singular values stand out of the noise. None where it was not measured."""
    grid: tuple[float, float] | None = None
    """`||error||` that the grids of base and tuned are expected to have put on the delta: steps over sqrt(12), zero of
    one that is not quantised. None where neither is."""
    served_error: float | None = None
    """`||served - base||`, where the adapter is served on another form of the base."""
    served_delta: float | None = None
    """`||tuned - served||`: the total delta, of which the adapter has the task's part."""
    cause: Reason | None = None
    """The reason as a code; None where it is carried."""
    way_out: Mapping[str, Any] = field(default_factory=dict)
    """Options that decide it, by name; null where their value is the user's to find."""


def energy_of(row: Row) -> float:
    """Of its delta; none of a counter, such as the batches that a norm has seen: it is no weight."""
    return (row.delta_norm or 0.0) ** 2 if "float" in row.dtype and row.cause is not Reason.NOT_FLOATING else 0.0


def energies(rows: Iterable[Row]) -> dict[str, float]:
    """By weight, the energy of its delta; where that is unknown, that of as many of the other values on average."""
    rows = list(rows)
    known = {row.weight: energy_of(row) for row in rows if not is_unknown(row)}
    compared = values(row for row in rows if row.weight in known and row.delta_norm is not None)
    each = sum(known.values()) / max(compared, 1)
    return {row.weight: known.get(row.weight, each * math.prod(row.shape)) for row in rows}


def is_unknown(row: Row) -> bool:
    """Whether the tuned model has it, and how it has changed cannot be told."""
    packed = row.cause is Reason.NOT_FLOATING and len(row.shape) > 1
    return packed or (row.status == "left out" and row.delta_norm is None and is_of_tuned(row))


def is_of_tuned(row: Row) -> bool:
    """Whether the tuned model has it."""
    return row.cause not in (Reason.ONLY_IN_BASE, Reason.UNREAD, Reason.OF_QUANTIZED)


def values(rows: Iterable[Row]) -> int:
    """How many numbers they hold."""
    return sum(math.prod(row.shape) for row in rows)


def left_out(rows: Iterable[Row]) -> dict[str, tuple[list[Row], float]]:
    """By reason, what is left out, and its share of the whole fine-tune's energy."""
    of_each, groups = energies(rows), dict[str, list[Row]]()
    for row in rows:
        if row.status == "left out":
            groups.setdefault(row.reason, []).append(row)
    everything = sum(of_each.values())
    return {why: (group, sum(of_each[row.weight] for row in group) / everything) for why, group in groups.items()}
