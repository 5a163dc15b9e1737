"""`whose`: which of several candidates a fine-tune was made from, from corners of a few weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.sample import FLAT, SQUARE, chosen, corners, flat, rounded_alike
from peft_posthoc.errors import PosthocError, one_line
from peft_posthoc.lineage.candidates import Found, called, given, named_by, nearby, opened
from peft_posthoc.lineage.compared import Candidate, compared, cosine
from peft_posthoc.sources import Source

# A cosine that is none, and one that is clearly some; two chance directions in these samples are far below the first.
_RIGHT, _SLANTED = 0.05, 0.1
# A sample in which chance alone makes cosines of a third of that says nothing of angles.
_FEWEST = 4000
# What nobody asked about, and is no relative, is counted alone.
_OTHERS = ("unrelated", "other architecture", "failed", "itself")


@dataclass
class Whose:
    """The candidates, and the one that is the base if that is sure."""

    tuned: str
    base: str | None
    reason: str
    candidates: list[Candidate] = field(default_factory=list)
    passed_over: int = 0
    """Models in the local cache that are no relatives."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def table(self) -> str:
        """The verdict, and a line for each candidate."""
        wide = max((len(one.name) for one in self.candidates), default=0)
        lines = [f"{one.name:<{wide}}  {one.kind}: {one.evidence}" for one in self.candidates]
        if self.passed_over:
            lines.append(f"and {self.passed_over} in the hub's local cache that are none of its relatives")
        return "\n".join([f"base: {self.base or 'unsure'} ({self.reason})", *lines])


def whose(tuned: Source, candidates: Sequence[Source] = ()) -> Whose:
    """Tell which candidate a fine-tune was made from. That it was made from one, and not one from it, is assumed.

    Args:
        tuned: The fine-tune, as `open_checkpoint` takes it.
        candidates: What it may come from. One that cannot be read is a row and stops no other. None are what its card
            and configuration name, what these name in turn, and the models of its kind in the hub's local cache.

    Raises:
        CheckpointError: The fine-tune cannot be read.
        PosthocError: It has no matrix to compare, or there is no candidate.
    """
    after = opened(tuned, "tuned")
    names = chosen(after)
    if not names:
        raise PosthocError(f"`{after.label}` has no matrices to compare.")
    found = given(candidates) if candidates else nearby(tuned, after)
    if not found:
        raise PosthocError(
            f"`{after.label}` names no base, and the hub's local cache holds no model of its kind. Give candidates."
        )
    fetched = any(getattr(side, "to_stream", 0) for side in (after, *(one.checkpoint for one in found)))
    edge = FLAT if fetched else SQUARE
    own = corners(after, names, edge)
    rows, kin = [], {}
    for one in found:
        try:
            row, sample = compared(after, own, one.read(), same=one.source is tuned or _same(after, one), edge=edge)
            row.name = one.name
        except Exception as error:
            row, sample = Candidate(one.name, "failed", one_line(error)), None
        if one.unasked and row.kind in _OTHERS:
            continue
        rows.append(row)
        if sample is not None and row.kind == "related":
            kin[len(rows) - 1] = sample
    _placed(own, rows, kin)
    made = _verdict(called(tuned, after), rows)
    made.passed_over = len(found) - len(rows)
    if made.base is None and (named := {*named_by(tuned, after)} & {row.name for row in rows}):
        made.reason += f"; `{sorted(named)[0]}` is what it names"
    return made


def _same(after: Checkpoint, one: Found) -> bool:
    """Tell whether a candidate is the fine-tune itself, whatever it is called."""
    before = one.read()
    if after.folder is not None and before.folder is not None:
        return after.folder.exists() and before.folder.exists() and after.folder.samefile(before.folder)
    return after.identity is not None and after.identity == before.identity


def _placed(own: dict[str, Tensor], rows: list[Candidate], kin: dict[int, dict[str, Tensor]]) -> None:
    """Tell kin apart by angles: independent changes are at right angles where their paths meet, and there alone."""
    middles: dict[int, list[bool]] = {at: [] for at in kin}
    copies: dict[int, list[int]] = {at: [] for at in kin}
    for first in kin:
        for second in kin:
            if first == second:
                continue
            names = [name for name in own if name in kin[first] and name in kin[second]]
            count = {name: min(len(kin[first][name]), len(kin[second][name])) for name in names}
            if not names:
                middles[first].append(False)
                continue
            cut = [{name: side[name][: count[name]] for name in names} for side in (own, kin[first], kin[second])]
            if all(rounded_alike(cut[1][name], cut[2][name]) for name in names):
                copies[first].append(second)
                continue
            tuned, a, b = (flat(side, names) for side in cut)
            at_a, at_b, at_tuned = cosine(tuned - a, b - a), cosine(tuned - b, a - b), cosine(a - tuned, b - tuned)
            if at_tuned < -0.95:
                for at, other in ((first, second), (second, first)):
                    rows[at].kind = "part of a merge"
                    rows[at].evidence = f"the fine-tune lies on the line to `{rows[other].name}`"
            right = abs(at_a) < _RIGHT and min(abs(at_b), abs(at_tuned)) > _SLANTED
            middles[first].append(right and len(tuned) >= _FEWEST)
    parents = [at for at, right in middles.items() if right and all(right) and rows[at].kind == "related"]
    if not parents or set(parents) - {parents[0], *copies[parents[0]]}:
        return
    rows[parents[0]].kind = "parent"
    for at in parents[1:]:
        rows[at].kind, rows[at].evidence = "copy of the parent", f"the same values as `{rows[parents[0]].name}`"
    rows[parents[0]].evidence += "; every other related one is reached through it"
    for at in kin:
        if at != parents[0] and rows[at].kind == "related":
            rows[at].kind = "sibling or grandparent"
            rows[at].evidence += f"; reached through `{rows[parents[0]].name}`"


def _verdict(tuned: str, rows: list[Candidate]) -> Whose:
    found = [row for row in rows if row.kind in ("copy", "quantised copy")] or [r for r in rows if r.kind == "parent"]
    if len(found) == 1:
        return Whose(tuned, found[0].name, found[0].kind, rows)
    if found:
        return Whose(tuned, None, "it is a copy of several", rows)
    kin = [row for row in rows if row.kind in ("related", "part of a merge", "unsure")]
    if any(row.kind == "part of a merge" for row in kin):
        return Whose(tuned, None, "it lies between candidates, as a merge of them does", rows)
    if len(kin) == 1 and kin[0].kind == "unsure":
        return Whose(tuned, None, f"`{kin[0].name}` alone is no stranger, and is far", rows)
    if len(kin) == 1:
        reason = f"`{kin[0].name}` alone is near: a parent or a sibling; a second relative would tell"
        return Whose(tuned, None, reason, rows)
    return Whose(tuned, None, "several are near and none is clearly between" if kin else "none is related", rows)
