"""Layers to an account: a row for every tensor of both checkpoints, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from peft_posthoc.checkpoints.mean import stand_in
from peft_posthoc.extraction.findings import Findings
from peft_posthoc.extraction.kinds import Carried, Left, by_kind, by_reason
from peft_posthoc.extraction.meaning import meaning
from peft_posthoc.extraction.outcomes import Kept, Layer, Outcome, Skipped
from peft_posthoc.extraction.reasons import LeftOut, Reason
from peft_posthoc.extraction.row import Row, energies, energy_of, is_unknown, left_out
from peft_posthoc.extraction.totals import Totals, powers_below, ratio, totals_of
from peft_posthoc.models.layout import GUESSED
from peft_posthoc.pairing.difference import Difference
from peft_posthoc.pairing.differences import told_as_notes, told_as_warnings
from peft_posthoc.text import as_html, counted, percent, shorten, size

# Shares of the whole delta's energy from which leaving something out is worth a warning.
MATERIAL = 0.01
# ||delta|| / ||base|| over all matrices. Two unrelated models give 1.4; fine-tunes stay well below 0.3.
IMPLAUSIBLE = 0.5


@dataclass(frozen=True, repr=False)
class Report:
    """An honest account of what an adapter holds."""

    rows: tuple[Row, ...]
    totals: Totals
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    """What was decided to compare the two checkpoints: of their names, and the like."""
    provenance: Mapping[str, Any]
    differences: tuple[Difference, ...] = ()
    """Of configuration and tokenizer: what no adapter carries."""
    by_kind: tuple[Carried, ...] = ()
    """What is carried of all modules that are called alike."""
    by_reason: tuple[Left, ...] = ()
    """What is left out."""

    @classmethod
    def of(cls, adapter: Findings) -> Report:
        """Account for an adapter."""
        rows = tuple(_rows(adapter))
        totals = totals_of(rows, adapter.file.rank, adapter.file.padding)
        beside = adapter.differences
        said, warned = meaning(rows, adapter.provenance)
        if (mean := stand_in(str(adapter.provenance["base"]))) is not None:
            warned.append(mean)
        warnings = (*adapter.file.warnings, *warned, *_warnings(rows, totals), *told_as_warnings(beside))
        notes = (*adapter.notes, *said, *told_as_notes(beside))
        return cls(rows, totals, warnings, notes, adapter.provenance, beside, by_kind(rows), by_reason(rows))

    def __repr__(self) -> str:
        return f"<Report: {self.summary()[0].removesuffix('.')}>"

    def _repr_html_(self) -> str:
        return as_html(self.table())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "format": 1,
            "totals": asdict(self.totals),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "by_kind": [asdict(one) for one in self.by_kind],
            "by_reason": [asdict(one) for one in self.by_reason],
            "differences": [asdict(one) for one in self.differences],
            "provenance": dict(self.provenance),
            "rows": [asdict(row) for row in self.rows],
        }

    def table(self, *, layers: bool = False) -> str:
        """The report for a terminal: what is kept, what is left out, what to mind; then a row for each kind of module.

        Args:
            layers: A row for every weight instead.
        """
        rows = self._layers() if layers else self._kinds()
        return "\n".join([*self._verdict(), *self.beside(), "", *rows])

    def beside(self) -> list[str]:
        """What is not factored, what was decided, and what to mind, a line each."""
        return [*_left_out_lines(self.rows), *self._remarks()]

    def summary(self) -> list[str]:
        """The totals and the warnings, a line each."""
        return [*self._verdict(), *self._remarks()]

    def _verdict(self) -> list[str]:
        totals = self.totals
        padded = totals.file_rank > totals.rank
        rank = f"{totals.rank} (padded to {totals.file_rank} in the file)" if padded else f"{totals.rank}"
        if self.provenance["options"].get("form") == "peft" and len({row.rank for row in self.rows if row.rank}) > 1:
            rank = f"up to {totals.rank}"
        held = counted(totals.extracted, f"weight at rank {rank} holds", f"weights at rank {rank} hold")
        their = "its delta's" if totals.extracted == 1 else "their deltas'"
        lines = [
            f"{held} {percent(totals.energy)} of {their} energy, "
            f"{totals.of_all} of the whole fine-tune's; {size(totals.bytes)} on disk.",
        ]
        if totals.padding >= MATERIAL * totals.bytes:
            lines.append(f"{size(totals.padding)} of that are zeros, for loaders that need one rank for all layers.")
        return lines

    def _remarks(self) -> list[str]:
        guessed = "No configuration or module was there to ask: linear layers were told by names and shapes."
        found = [guessed] if self.provenance["layout"] == GUESSED else []
        return [*found, *self.notes, *(f"Warning: {warning}" for warning in self.warnings)]

    def _kinds(self) -> list[str]:
        lines = [f"{'modules':<40} {'weights':>8} {'rank':>11} {'E_r':>7} {'of all':>7} {'size':>9}"]
        return lines + [
            f"{shorten(one.kind, 40):<40} {one.weights:>8} {one.ranks:>11} {percent(one.energy):>7} "
            f"{percent(one.of_all):>7} {size(one.bytes):>9}"
            for one in self.by_kind
        ]

    def _layers(self) -> list[str]:
        measured = any(row.signal_rank is not None for row in self.rows)
        more = f" {'signal':>7} {'noise':>7}" if measured else ""
        lines = [f"{'weight':<52} {'rank':>5} {'E_r':>7} {'error':>7} {'|d|/|w|':>8} {'size':>9}{more}"]
        return lines + [
            f"{shorten(row.weight):<52} {row.rank:>5} {percent(row.energy):>7} {percent(row.relative_error):>7} "
            f"{percent(row.relative_delta):>8} {size(row.bytes):>9}"
            + (f" {row.signal_rank:>7} {percent(row.noise):>7}" if measured else "")
            for row in self.rows
            if row.status == "extracted"
        ]


def _rows(adapter: Findings) -> Iterable[Row]:
    for name in adapter.plan.headers:
        if name in adapter.layers:
            yield _extracted(adapter, adapter.layers[name])
        elif name in adapter.kept:
            yield _kept(adapter, adapter.kept[name])
        else:
            yield _skipped(adapter, adapter.skipped[name])


def _known(adapter: Findings, found: Outcome, **more: Any) -> Row:
    """A row with what the headers tell and what is known of every outcome."""
    plan, file, name = adapter.plan, adapter.file, found.weight
    places = plan.carried.get(name) or plan.layout.places(name)
    modules = tuple(place.module for place in places if place.module in file.bytes_by_module)
    shown = {
        "modules": modules,
        "base_norm": found.base_norm,
        "relative_delta": ratio(more["delta_norm"], found.base_norm),
        "bytes": sum(file.bytes_by_module[module] for module in modules),
        "seconds": found.seconds,
    }
    header = plan.headers[name]
    return Row(weight=name, shape=header.shape, dtype=str(header.dtype).removeprefix("torch."), **(shown | more))


def _extracted(adapter: Findings, layer: Layer) -> Row:
    factors = layer.factors
    return _known(
        adapter,
        layer,
        status="extracted",
        rank=len(factors.s),
        energy=factors.energy,
        energy_at={rank: factors.cut(rank).energy for rank in powers_below(len(factors.s))},
        relative_error=math.sqrt(max(0.0, 1 - factors.energy)),
        delta_norm=factors.norm,
        shortfall=factors.shortfall,
        residual=float(factors.residual.max()),
        noise=None if layer.noise is None else min(layer.noise.energy / factors.norm**2, 1.0),
        signal_rank=layer.signal,
        grid=layer.grid and (math.sqrt(layer.grid[0]), math.sqrt(layer.grid[1])),
        served_error=layer.served.error if layer.served else None,
        served_delta=layer.served.delta if layer.served else None,
    )


def _kept(adapter: Findings, kept: Kept) -> Row:
    changed = kept.delta_norm > 0
    return _known(
        adapter,
        kept,
        status="whole" if changed else "unchanged",
        modules=adapter.plan.kept[kept.weight].modules if changed else (),
        energy=1.0 if changed else None,
        relative_error=0.0 if changed else None,
        delta_norm=kept.delta_norm,
        bytes=adapter.file.bytes_of_whole.get(kept.weight, 0),
    )


def _skipped(adapter: Findings, skipped: Skipped) -> Row:
    fate, unchanged = adapter.plan.fates[skipped.weight], skipped.delta_norm == 0
    held = skipped.weight in adapter.held and not unchanged
    left_out = fate if isinstance(fate, LeftOut) and not unchanged and not held else None
    return _known(
        adapter,
        skipped,
        status="unchanged" if unchanged else "whole" if held else "left out",
        reason=left_out.text if left_out else "",
        cause=left_out.reason if left_out else None,
        way_out=left_out.way_out if left_out else {},
        energy=float(held) if skipped.delta_norm else None,
        relative_error=float(not held) if skipped.delta_norm else None,
        delta_norm=skipped.delta_norm,
        tuned_norm=skipped.tuned_norm,
    )


def _warnings(rows: tuple[Row, ...], totals: Totals) -> Iterable[str]:
    for reason, (group, share) in left_out(rows).items():
        if share >= MATERIAL:
            about = "About " if any(map(is_unknown, group)) else ""
            number = counted(len(group), "tensor")
            yield f"{about}{percent(share)} of the fine-tune's energy is left out in {number}: {reason}."
    if totals.unknown >= MATERIAL:
        yield (
            f"{percent(totals.unknown)} of the fine-tune's values have nothing in the base to be compared with: of the "
            "whole they count as changed like the others."
        )
    for side, other, cause in (
        ("base", "tuned", Reason.ONLY_IN_BASE),
        ("tuned", "base", Reason.ONLY_IN_TUNED),
    ):
        only = [row for row in rows if row.cause is cause]
        if only:
            norms = [f"{row.weight} (norm {row.base_norm or row.tuned_norm or 0:.3g})" for row in only[:3]]
            names = ", ".join(norms) + (", ..." if len(only) > 3 else "")
            number = counted(len(only), "tensor is", "tensors are")
            yield f"{number} only in {side}, not in {other}, and not carried: {names}."
    apart = [row for row in rows if row.cause is Reason.OTHER_SHAPE]
    if apart:
        number = counted(len(apart), "tensor has another shape", "tensors have other shapes")
        yield f"{number} in tuned than in base, and not carried: {apart[0].weight}."
    tied = [row for row in rows if row.status == "extracted" and len(row.modules) > 1]
    if tied:
        yield (
            f"`{tied[0].weight}` is tied and carried in {', '.join(tied[0].modules)}. Serve it unmerged: PEFT's "
            "`merge_and_unload` adds both to the one weight, and llama.cpp does not load it."
        )
    if totals.relative_delta is not None and totals.relative_delta > IMPLAUSIBLE:
        yield (
            f"The delta is {percent(totals.relative_delta)} of the base's norm, more than fine-tuning makes it. Is "
            "this the base that the fine-tune started from?"
        )


def _left_out_lines(rows: tuple[Row, ...]) -> list[str]:
    lines = []
    if whole := [row for row in rows if row.status == "whole"]:
        share = sum(map(energy_of, whole)) / sum(energies(rows).values())
        lines.append(
            f"whole: {len(whole):>7} norms, biases and the like: {percent(share)} of the fine-tune's energy, "
            f"{size(sum(row.bytes for row in whole))}"
        )
    for reason, (group, share) in left_out(rows).items():
        about = "about " if any(map(is_unknown, group)) else ""
        lines.append(f"left out: {len(group):>4} x {reason}: {about}{percent(share)} of the fine-tune's energy")
    unchanged = sum(row.status == "unchanged" for row in rows)
    return [*lines, *([f"unchanged: {unchanged:>3}"] if unchanged else [])]
