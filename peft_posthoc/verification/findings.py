"""The findings about an adapter: its weights, its outputs, and the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from peft_posthoc.models.grid import cells
from peft_posthoc.pairing.difference import Difference
from peft_posthoc.pairing.differences import told_as_notes, told_as_warnings
from peft_posthoc.text import shorten
from peft_posthoc.texts.distance import Distance
from peft_posthoc.texts.sequences import Kind
from peft_posthoc.verification.outputs import Outputs
from peft_posthoc.verification.weights import WeightRow

# A distance of outputs that rounding alone makes.
_SAME = 1e-6
_COLUMNS = f"{'cos(ba,d)':>10} {'err(ba,d)':>10} {'cos(w,tuned)':>13} {'err(w,tuned)':>13}"


@dataclass(frozen=True)
class Verification:
    """The findings of `verify`."""

    rows: tuple[WeightRow, ...]
    cosine: float
    """Cosine of the adapter with the whole fine-tune's delta, what is left out included."""
    energy: float
    """Share of the whole delta's energy that the adapter, as saved, explains."""
    worst: str
    """The carried weight with the lowest `delta_cosine`."""
    adapter: Outputs | None
    """Base + adapter against tuned; None if outputs were not compared."""
    base: Outputs | None
    """Base alone against tuned: what the adapter's numbers are to be held against."""
    outputs_note: str
    """The inputs that were compared on, or why nothing was."""
    failure: str = ""
    """The reason why outputs could not be compared as asked; empty where nothing failed."""
    on_texts: Mapping[str, Mapping[Kind, Distance]] = field(default_factory=dict)
    """Of `base` and `adapter`, the distance from tuned on texts of each kind, where texts were given or asked for."""
    uncompared: tuple[str, ...] = ()
    """Tensors that one checkpoint alone has, or both in other shapes or as whole numbers."""
    notes: tuple[str, ...] = ()
    """Doubts about the models that were given."""
    differences: tuple[Difference, ...] = ()
    """Of configuration and tokenizer: base + adapter keeps the base's."""

    @property
    def nearer(self) -> bool:
        """True if base + adapter is nearer to tuned than base is, by all that was compared."""
        return not self._no_nearer()

    def verdict(self) -> str:
        """The findings in one sentence."""
        if where := self._no_nearer():
            return f"Base + adapter is no nearer to tuned than base is: not in its {' and not in its '.join(where)}."
        return f"Base + adapter is nearer to tuned than base is{'' if self.adapter else ', by its weights'}."

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain JSON values."""
        return {"format": 1, "nearer": self.nearer, **asdict(self)}

    def _no_nearer(self) -> list[str]:
        found = [] if self.energy > 0 else ["weights"]
        if self.adapter is not None and self.base is not None:
            adapted, alone = self.adapter.distance, self.base.distance
            found += [] if adapted < alone or adapted <= _SAME else ["outputs"]
        return found

    def table(self, *, layers: bool = False) -> str:
        """The findings for a terminal; with `layers` a row for every weight."""
        return f"{self.weights(layers=layers)}\n{self.rest()}"

    def weights(self, *, layers: bool = False) -> str:
        """What the weights are together, and a row for each kind of module, the worst one's, or for every weight."""
        carried = [row for row in self.rows if row.delta_cosine]
        lines = [
            f"Weights: the adapter has cosine {self.cosine:.4f} with the whole delta and explains {self.energy:.1%} "
            f"of its energy; of what it carries, `{self.worst}` comes out worst.",
            "",
        ]
        if layers:
            shown = [(shorten(row.weight), row) for row in carried]
            lines.append(f"{'weight':<52} {_COLUMNS}")
        else:
            shown = [(f"{kind} ({len(rows)})", min(rows, key=_nearness)) for kind, rows in _by_kind(carried).items()]
            lines.append(f"{'the worst of each kind':<52} {_COLUMNS}")
        lines += [
            f"{name:<52} {_number(row.delta_cosine):>10} {_number(row.delta_relative_error):>10} "
            f"{_number(row.cosine, 6):>13} {_number(row.relative_error, 6):>13}"
            for name, row in shown
        ]
        if self.uncompared:
            some = ", ".join(self.uncompared[:3]) + (", ..." if len(self.uncompared) > 3 else "")
            lines += ["", f"Not compared, as base and tuned hold them differently: {len(self.uncompared)} ({some})."]
        return "\n".join(lines)

    def rest(self) -> str:
        """Outputs, doubts and differences, and the verdict last."""
        lines = []
        if self.adapter is None or self.base is None:
            lines.append(f"Outputs not compared: {(self.failure or self.outputs_note).removesuffix('.')}.")
        else:
            for name, outputs in (("base", self.base), ("base + adapter", self.adapter)):
                said = [] if outputs.kl is None else [f"KL {outputs.kl:.5f} nats, top-1 agreement {outputs.top1:.1%}"]
                said += [] if outputs.relative_error is None else [f"relative error {outputs.relative_error:.4f}"]
                lines.append(f"{name + ' against tuned:':<29} {', '.join(said)}")
            if general := {name: score["general"] for name, score in self.on_texts.items() if "general" in score}:
                told = [f"{name} KL {one.kl:.5f}, top-1 {one.top1:.1%}" for name, one in general.items()]
                lines.append(f"On general text: {'; '.join(told)}.")
            lines.append(f"({self.outputs_note})")
        warnings = [f"Warning: {warning}" for warning in told_as_warnings(self.differences)]
        return "\n".join([*lines, *self.notes, *told_as_notes(self.differences), *warnings, self.verdict()])


def _by_kind(rows: Iterable[WeightRow]) -> dict[str, list[WeightRow]]:
    """The rows of modules that are called alike, in the order of the rows."""
    rows = list(rows)
    places = cells(row.weight.partition("[")[0] for row in rows)
    found: dict[str, list[WeightRow]] = {}
    for row in rows:
        found.setdefault(places[row.weight.partition("[")[0]].module, []).append(row)
    return found


def _nearness(row: WeightRow) -> float:
    return row.delta_cosine or 0.0


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
