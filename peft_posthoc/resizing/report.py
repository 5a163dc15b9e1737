"""An account of resizing: a row for every module, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from peft_posthoc.adapters.module import Kind
from peft_posthoc.models.grid import cells
from peft_posthoc.text import counted, percent, shorten, size


@dataclass(frozen=True)
class Row:
    """One module."""

    module: str
    kind: Kind
    shape: tuple[int, int]
    """`m` and `n` of its delta."""
    deltas: int
    """More than one where experts are stacked."""
    rank_before: int
    """Pairs in the input."""
    true_rank: int
    """Singular values of the delta that are not zero."""
    rank: int
    """Singular triplets kept."""
    energy: float | None
    """The share of the delta's energy that is kept; None where there is no delta."""
    relative_error: float | None
    """`||delta - b @ a|| / ||delta||`, before rounding to the saved dtype."""
    delta_norm: float
    bytes_before: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Totals:
    """Sums over all rows; shares are weighted by energy."""

    energy: float
    relative_error: float
    rank: int
    """The largest that a module keeps."""
    file_rank: int
    """`r` of the file."""
    modules: int
    zero: int
    """Modules that are in the file without a delta."""
    whole: int
    """Tensors that take the place of the base's, and are as they were."""
    bytes_before: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class ResizeReport:
    """An account of what a resized or combined adapter keeps of the deltas it was made from."""

    rows: tuple[Row, ...]
    totals: Totals
    warnings: tuple[str, ...]
    provenance: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {"format": 1, **asdict(self)}

    def table(self, *, layers: bool = False) -> str:
        """The report for a terminal: what is kept, what to mind, and a row for each kind of module.

        Args:
            layers: A row for every module instead.
        """
        rows = self._layers() if layers else self._kinds()
        return "\n".join([*self._verdict(), *(f"Warning: {warning}" for warning in self.warnings), "", *rows])

    def _verdict(self) -> list[str]:
        totals = self.totals
        padded = f" (padded to {totals.file_rank} in the file)" if totals.file_rank > totals.rank else ""
        up_to = "up to " if len({row.rank for row in self.rows if row.rank}) > 1 else ""
        at = f"at rank {up_to}{totals.rank}{padded}"
        held = counted(totals.modules, f"module {at} holds", f"modules {at} hold")
        their = "its delta's" if totals.modules == 1 else "their deltas'"
        lines = [
            f"{held} {percent(totals.energy)} of {their} energy; "
            f"{size(totals.bytes)} on disk, of {size(totals.bytes_before)}."
        ]
        if totals.zero:
            lines.append(
                f"{counted(totals.zero, 'module has no delta and is', 'modules have no delta and are')} there as zeros."
            )
        if totals.whole:
            lines.append(f"{counted(totals.whole, 'tensor is', 'tensors are')} there whole, unchanged.")
        return lines

    def _kinds(self) -> list[str]:
        places = cells(row.module for row in self.rows)
        kinds: dict[str, list[Row]] = {}
        for row in self.rows:
            kinds.setdefault(places[row.module].module, []).append(row)
        lines = [f"{'modules':<40} {'count':>6} {'from':>9} {'true':>9} {'rank':>9} {'E_r':>7} {'size':>9}"]
        for kind, rows in kinds.items():
            energy = sum(row.delta_norm**2 for row in rows)
            kept = sum((row.energy or 0.0) * row.delta_norm**2 for row in rows)
            ranks = [_range(getattr(row, name) for row in rows) for name in ("rank_before", "true_rank", "rank")]
            lines.append(
                f"{shorten(kind, 40):<40} {len(rows):>6} {' '.join(f'{one:>9}' for one in ranks)} "
                f"{percent(kept / energy if energy else None):>7} {size(sum(row.bytes for row in rows)):>9}"
            )
        return lines

    def _layers(self) -> list[str]:
        lines = [f"{'module':<52} {'from':>5} {'true':>5} {'rank':>5} {'E_r':>7} {'error':>7} {'size':>9}"]
        return lines + [
            f"{shorten(row.module):<52} {row.rank_before:>5} {row.true_rank:>5} {row.rank:>5} "
            f"{percent(row.energy):>7} {percent(row.relative_error):>7} {size(row.bytes):>9}"
            for row in self.rows
        ]


def _range(ranks: Iterable[int]) -> str:
    low, *_, high = sorted([*ranks] * 2)
    return str(low) if low == high else f"{low} to {high}"
