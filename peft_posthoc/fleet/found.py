"""What became of every fine-tune of a fleet, and how alike they are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from peft_posthoc.errors import AdapterError, one_line
from peft_posthoc.fleet.compare import Comparison
from peft_posthoc.fleet.member import Member
from peft_posthoc.models.grid import cells
from peft_posthoc.models.order import index, natural
from peft_posthoc.text import percent, shorten, size

_WIDTH = 32


@dataclass(frozen=True)
class One:
    """A fine-tune of the fleet."""

    name: str
    tuned: str
    folder: Path
    state: str
    """`made`, `was there` from an earlier run, or `failed`."""
    error: str | None
    """The one line that says why there is no adapter."""
    report: Mapping[str, Any] | None
    """As it lies beside the adapter."""

    @property
    def totals(self) -> Mapping[str, Any]:
        """Of the report."""
        found: Mapping[str, Any] = (self.report or {}).get("totals", {})
        return found

    def changed(self) -> dict[str, float]:
        """By numbered layer, and `other`: the norm of what changed in its matrices, against that of the base's."""
        # Norms and biases are few, and would hide how far the others moved.
        rows = [
            row
            for row in (self.report or {}).get("rows", ())
            if row["delta_norm"] is not None and len(row["shape"]) > 1
        ]
        places = cells(row["weight"] for row in rows)
        sums: dict[str, list[float]] = {}
        for row in rows:
            layer = places[row["weight"]].layer
            found = sums.setdefault("other" if layer is None else str(layer), [0.0, 0.0])
            found[0] += row["delta_norm"] ** 2
            found[1] += (row["base_norm"] or 0.0) ** 2
        return {layer: math.sqrt(delta / base) if base else 0.0 for layer, (delta, base) in sums.items()}

    def most(self) -> str:
        """The layers that changed most, for people."""
        changed = {layer: share for layer, share in self.changed().items() if share > 0}
        top = sorted(changed, key=lambda layer: -changed[layer])[:3]
        return ", ".join(f"{layer} ({percent(changed[layer])})" for layer in top) or "-"


@dataclass(frozen=True)
class Found:
    """What became of every fine-tune, and how alike their adapters are."""

    base: str
    members: tuple[One, ...]
    comparison: Comparison | None
    """Of the adapters that are there; None where there is none, or they cannot be compared."""
    not_compared: str | None = None
    """Why they cannot."""

    @classmethod
    def of(cls, base: str, members: Sequence[Member]) -> Self:
        """Look at what was made."""
        ones = tuple(
            One(
                member.name,
                member.work.prepared.tuned.label if member.begun else str(member.source),
                member.place,
                member.state,
                member.error,
                member.report,
            )
            for member in members
        )
        there = {one.name: one.folder for one in ones if one.error is None}
        try:
            return cls(base, ones, Comparison.of(there) if there else None)
        except AdapterError as error:  # They are made all the same.
            return cls(base, ones, None, one_line(error))

    @property
    def failed(self) -> list[One]:
        """Those that have no adapter."""
        return [one for one in self.members if one.error is not None]

    @property
    def bytes(self) -> int:
        """Of all adapters."""
        return sum(one.totals["bytes"] for one in self.members if one.error is None)

    def layers(self) -> list[str]:
        """The numbered layers of all, and `other`."""
        found = {layer for one in self.members for layer in one.changed()}
        return sorted(found, key=lambda layer: (index(layer) is None, natural(layer)))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; each report lies beside its adapter."""
        compared = self.comparison
        return {
            "format": 1,
            "base": self.base,
            "adapters": [
                {
                    "name": one.name,
                    "tuned": one.tuned,
                    "folder": str(one.folder),
                    "state": one.state,
                    "error": one.error,
                    "totals": dict(one.totals),
                    "warnings": (one.report or {}).get("warnings", []),
                    "relative_delta_by_layer": one.changed(),
                }
                for one in self.members
            ],
            "not_compared": self.not_compared,
            "compared": None
            if compared is None
            else {
                "names": list(compared.names),
                "norms": compared.norms.tolist(),
                "cosines": compared.cosines.tolist(),
                "rank": compared.rank,
                "shared_basis": compared.shared,
            },
        }

    def table(self) -> str:
        """For a terminal: a row for each fine-tune, and what they have in common."""
        lines = [
            f"{'adapter':<{_WIDTH}} {'rank':>5} {'E_r':>7} {'of all':>7} {'|d|/|w|':>8} {'size':>9}  "
            f"{'most changed layers':<32} nearest (cosine)"
        ]
        return "\n".join([*lines, *map(self._row, self.members), "", *self.summary()])

    def _row(self, one: One) -> str:
        name, totals = f"{shorten(one.name, _WIDTH):<{_WIDTH}}", one.totals
        if one.error is not None:
            return f"{name} failed: {one.error}"
        nearest = self.comparison.nearest(one.name) if self.comparison else None
        near = f"{nearest[0]} ({nearest[1]:.2f})" if nearest else "-"
        return (
            f"{name} {totals['rank']:>5} {percent(totals['energy']):>7} {percent(totals['energy_of_all']):>7} "
            f"{percent(totals['relative_delta']):>8} {size(totals['bytes']):>9}  {one.most():<32} {near}"
        )

    def summary(self) -> list[str]:
        """What is known of all, a line each."""
        return [*self._together(), *(f"Warning {text}" for text in self.warnings())]

    def _together(self) -> Iterable[str]:
        good = [one for one in self.members if one.error is None]
        was = sum(one.state == "was there" for one in good)
        before = f", {was} of them from an earlier run" if was else ""
        failed = f" {len(self.failed)} failed." if self.failed else ""
        yield (
            f"{len(good)} of {len(self.members)} fine-tunes have an adapter{before}; {size(self.bytes)} on "
            f"disk.{failed}"
        )
        if self.not_compared:
            yield f"The adapters were not compared: {self.not_compared}"
        if self.comparison and len(good) > 1:
            told = ", ".join(f"{percent(share)} at rank {rank}" for rank, share in self.comparison.shares())
            if told:
                yield f"One lora_A for all would keep of the adapters' energy: {told}."
            yield "Cosines and this are exact for the adapters, not for what they leave out of the fine-tunes."

    def warnings(self) -> Iterable[str]:
        """What the reports warn of; of warnings that only have other numbers, the first."""
        found: dict[str, list[tuple[str, str]]] = {}
        for one in self.members:
            for warning in (one.report or {}).get("warnings", ()):
                found.setdefault(re.sub(r"[\d.]+", "", warning), []).append((one.name, warning))
        for (name, warning), *others in found.values():
            yield f"({name}{f', and alike {len(others)} others' if others else ''}): {warning}"
