"""Spectra of all deltas, and what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.plan import tuned_bytes
from peft_posthoc.extraction.report import MATERIAL, Report
from peft_posthoc.extraction.row import Row
from peft_posthoc.inspection.answers import Candidate, candidates, of
from peft_posthoc.inspection.curves import Curves
from peft_posthoc.inspection.shares import Share, shares
from peft_posthoc.models.grid import Cell, cells
from peft_posthoc.ranks.rules import fixed
from peft_posthoc.text import counted, percent, sized

if TYPE_CHECKING:
    from jaxtyping import Float

# The columns of the terminal's table, and of the page's.
COLUMNS = (8, 16, 32, 64, 128, 256, 512)
_MOST = 0.9  # of the energy: the first adapter that keeps so much is the answer


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

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to mind."""
        return self.report.warnings

    @cached_property
    def rows(self) -> dict[str, Row]:
        """By weight name: the report's row of every factored layer."""
        return {row.weight: row for row in self.report.rows if row.weight in self.spectra}

    @cached_property
    def kinds(self) -> dict[str, list[str]]:
        """By module: the names of its weights that were factored."""
        found: dict[str, list[str]] = {}
        for name in self.rows:
            found.setdefault(self.cells[name].module, []).append(name)
        return found

    def energy_of(self, kind: str) -> float:
        """Of the deltas of all modules that are called alike."""
        return sum((self.rows[name].delta_norm or 0.0) ** 2 for name in self.kinds[kind])

    @cached_property
    def shares(self) -> tuple[Share, ...]:
        """Where the whole change is, with what is not carried."""
        return shares(self.report.rows)

    @property
    def answer(self) -> Candidate:
        """Of what was written, or of the usual ranks, the first that keeps most of the change, or the last."""
        written = [one for one in self.candidates if one.rule is None]
        found = written or [one for one in self.candidates if isinstance(one.rule, fixed)]
        return next((one for one in found if one.energy >= _MOST), found[-1]) if found else self.telling()

    def bytes(self, one: Candidate) -> int | None:
        """Of an adapter, in the form that was asked for."""
        of_peft = self.report.provenance["options"].get("form") == "peft"
        return one.peft if of_peft or one.portable is None else one.portable

    def is_larger(self, count: int | None) -> bool:
        """Tell whether so many bytes are more than the fine-tune itself has."""
        return (count or 0) > self.tuned_bytes

    def kept(self) -> str:
        """What the answer keeps and takes, as a sentence."""
        one, kinds = self.answer, self.report.by_kind
        size, weights = self.bytes(one), counted(len(self.spectra), "weight")
        called = {fixed: f"Rank {one.flags.split()[-1]}", type(None): f"The adapter ({one.flags})"}
        of_all = sum(kind.of_all * (one.energy if kind.rank else 1) for kind in kinds)
        larger = f", more than the fine-tune itself ({sized(self.tuned_bytes)})" if self.is_larger(size) else ""
        return (
            f"{called.get(type(one.rule), one.flags)} keeps {one.at_least(percent(one.energy))} of the change of the "
            f"{weights} that it carries, {one.at_least(percent(of_all))} of the whole change, in "
            f"{one.at_least(sized(size))}{larger}."
        )

    def missing(self) -> str:
        """What of the change no rank would carry, as a sentence; nothing where it is little."""
        gone = sorted((share for share in self.shares if share.left_out >= MATERIAL), key=lambda one: -one.left_out)
        if not gone:
            return ""
        others = [f"{one.module} {percent(one.left_out)}" for one in gone[1:4]]
        told = [f"{gone[0].module} holds {percent(gone[0].left_out)} of the whole change", *others]
        if more := gone[4:]:
            told.append(f"{len(more)} more {percent(sum(one.left_out for one in more))}")
        return f"{', '.join(told)}{' and is' if len(gone) == 1 else ': they are'} not carried."

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
            "shares": {one.module: one.to_dict() for one in self.shares},
            "rules": [one.to_dict() for one in self.candidates],
            "warnings": list(self.report.warnings),
            "notes": list(self.report.notes),
            "differences": self.report.to_dict()["differences"],
            "provenance": dict(self.report.provenance),
        }
