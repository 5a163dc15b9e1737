"""Spectra of all deltas, as numbers and as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.plan import tuned_bytes
from peft_posthoc.extraction.report import Report
from peft_posthoc.extraction.row import Row
from peft_posthoc.inspection.answers import Candidate, candidates, of
from peft_posthoc.inspection.curves import Curves
from peft_posthoc.models.grid import Cell, cells
from peft_posthoc.text import percent, shorten, sized

if TYPE_CHECKING:
    from jaxtyping import Float

# The columns of the terminal's table, and of the page's.
COLUMNS = (8, 16, 32, 64, 128, 256, 512)
_WIDTH = 46


@dataclass(frozen=True)
class Found:
    """The spectra of all deltas, and what every rank rule would make of them."""

    curves: Curves
    spectra: Mapping[str, Float[Tensor, " ranks"]]
    """By weight name: the leading singular values of its delta."""
    candidates: tuple[Candidate, ...]
    """The rules' answers."""
    cells: Mapping[str, Cell]
    """By weight name: layer and module."""
    report: Report
    """Of the adapter with all that was factored."""
    tuned_bytes: int
    """Of the tuned checkpoint."""

    @classmethod
    def of(cls, adapter: Adapter, written: Mapping[str, Adapter] | None = None) -> Self:
        """Read what an adapter's spectra tell.

        Args:
            adapter: Up to its ranks all is known.
            written: Adapters that were made of it, by what they are called.
        """
        made = [of(name, one) for name, one in (written or {}).items()]
        return cls(
            curves=Curves.of(adapter),
            spectra={name: layer.factors.s for name, layer in adapter.layers.items()},
            candidates=(*made, *candidates(adapter)),
            cells=cells(adapter.layers),
            report=adapter.report,
            tuned_bytes=tuned_bytes(adapter.plan),
        )

    @cached_property
    def rows(self) -> dict[str, Row]:
        """By weight name: the report's row of every factored layer."""
        return {row.weight: row for row in self.report.rows if row.weight in self.spectra}

    def ranks(self) -> list[int]:
        """The ranks worth a column in tables."""
        top = len(self.curves.total)
        return [rank for rank in COLUMNS if rank <= top] or self.curves.ranks()

    @property
    def covered(self) -> float:
        """The share of the whole change's energy that lies in the factored layers."""
        totals = self.report.totals
        return min(totals.energy_of_all / totals.energy, 1.0) if totals.energy else 0.0

    def rank_for(self, share: float) -> str:
        """The rank, the same in all layers, that keeps this share of all energy."""
        reached = int((self.curves.total < share).sum()) + 1
        top = len(self.curves.total)
        return str(reached) if reached <= top else f">{top}"

    def values(self, weight: str) -> int:
        """How many numbers a weight holds."""
        return math.prod(self.rows[weight].shape)

    def shown(self) -> list[Candidate]:
        """The rules whose ranks differ between layers: those by energy, and `auto`."""
        energies = [one for one in self.candidates if one.share is not None]
        auto = self.measured()
        return [*energies, *([auto] if auto else [])]

    def telling(self) -> Candidate:
        """The rule for 90 % of every layer's energy; or for half, where most layers need more than was factored."""
        half, most, *_ = (one for one in self.candidates if one.share is not None)
        return most if 4 * len(most.beyond) <= len(most.ranks) else half

    def measured(self) -> Candidate | None:
        """The answer of `--rank auto`; None if the noise was not measured."""
        return next((one for one in self.candidates if one.measures), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the i-th number of a list belongs to rank i + 1."""
        return self.curves.to_dict() | {
            "singular_values": {name: s.tolist() for name, s in self.spectra.items()},
            "weights": {
                name: {
                    "layer": self.cells[name].layer,
                    "module": self.cells[name].module,
                    "shape": list(row.shape),
                    "relative_delta": row.relative_delta,
                    "noise": row.noise,
                    "signal_rank": row.signal_rank,
                }
                for name, row in self.rows.items()
            },
            "rules": [one.to_dict() for one in self.candidates],
            "warnings": list(self.report.warnings),
            "notes": list(self.report.notes),
            "differences": self.report.to_dict()["differences"],
            "provenance": dict(self.report.provenance),
        }

    def table(self) -> str:
        """For a terminal: a row for every layer, a row for every rule."""
        lines = [*self._layers(), "", *self._rules(), ""]
        lines += [*self.report.notes, *(f"Warning: {warning}" for warning in self.report.warnings)]
        return "\n".join(lines).rstrip()

    def _layers(self) -> Iterable[str]:
        ranks, telling, auto = self.ranks(), self.telling(), self.measured()
        share = f"{telling.share:.0%}"
        more = f" {'auto':>5} {'noise':>6}" if auto else ""
        ends = f" {'for ' + share:>8}{more}"
        yield f"{'E_r at rank':<{_WIDTH}} " + " ".join(f"{rank:>6}" for rank in ranks) + ends
        rows = self.rows
        for name in self.curves.layers:
            cells = [f"{100 * self.curves.at(name, rank):>5.1f}%" for rank in ranks]
            end = f" {telling.rank(name):>8}"
            if auto:
                end += f" {auto.rank(name):>5} {percent(rows[name].noise):>6}"
            yield f"{shorten(name, _WIDTH):<{_WIDTH}} {' '.join(cells)}{end}"
        total = [f"{100 * float(self.curves.total[rank - 1]):>5.1f}%" for rank in ranks]
        yield f"{'total':<{_WIDTH}} {' '.join(total)}"

    def _rules(self) -> Iterable[str]:
        wide = max(len(one.flags) for one in self.candidates)
        yield f"{'rule':<{wide}} {'ranks':>12} {'E_r':>7} {'error':>7} {'portable':>10} {'(padding)':>10} {'peft':>10}"
        for one in self.candidates:
            if not one.ranks:
                yield f"{one.flags:<{wide}} {one.reason}"
                continue
            shares = [one.at_least(percent(one.energy)), one.at_most(percent(one.error))]
            sizes = [one.at_least(sized(one.portable)), f"({sized(one.padding)})", one.at_least(sized(one.peft))]
            numbers = [*(f"{text:>7}" for text in shares), *(f"{text:>10}" for text in sizes)]
            yield f"{one.flags:<{wide}} {one.lowest_to_highest():>12} {' '.join(numbers)}"
