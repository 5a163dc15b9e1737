"""`whose`: which of several candidates a fine-tune was made from, from corners of a few weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.hub import find, is_repo_id
from peft_posthoc.checkpoints.sample import chosen, corners, flat
from peft_posthoc.errors import CheckpointError, PosthocError, one_line
from peft_posthoc.lineage.compared import Candidate, compared, cosine
from peft_posthoc.sources import Source, open_checkpoint

# A cosine that is none, and one that is clearly some; two chance directions in these samples are far below the first.
_RIGHT, _SLANTED = 0.05, 0.1
# A sample in which chance alone makes cosines of a third of that says nothing of angles.
_FEWEST = 4000


@dataclass
class Whose:
    """The candidates, and the one that is the base if that is sure."""

    tuned: str
    base: str | None
    reason: str
    candidates: list[Candidate] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def table(self) -> str:
        """The verdict, and a line for each candidate."""
        wide = max((len(one.name) for one in self.candidates), default=0)
        lines = [f"{one.name:<{wide}}  {one.kind}: {one.evidence}" for one in self.candidates]
        return "\n".join([f"base: {self.base or 'unsure'} ({self.reason})", *lines])


def whose(tuned: Source, candidates: Sequence[Source]) -> Whose:
    """Tell which candidate a fine-tune was made from. That it was made from one, and not one from it, is assumed.

    Args:
        tuned: The fine-tune, as `open_checkpoint` takes it.
        candidates: What it may come from. One that cannot be read is a row and stops no other.

    Raises:
        CheckpointError: The fine-tune cannot be read.
        PosthocError: It has no matrix to compare.
    """
    after = _opened(tuned, "tuned")
    names = chosen(after)
    if not names:
        raise PosthocError(f"`{after.label}` has no matrices to compare.")
    own = corners(after, names)
    rows, kin = [], {}
    for at, source in enumerate(candidates):
        try:
            before = _opened(source, "candidate")
            label = before.label
            row, sample = compared(after, own, before, same=source is tuned or _same_place(tuned, source))
        except Exception as error:
            label = str(source) if isinstance(source, str | os.PathLike) else type(source).__name__
            row, sample = Candidate(label, "failed", one_line(error)), None
        rows.append(row)
        if sample is not None and row.kind == "related":
            kin[at] = sample
    _placed(own, rows, kin)
    return _verdict(after.label, rows)


def _opened(source: Source, role: str) -> Checkpoint:
    """A checkpoint whose weights are on this machine: opening some kinds of a hub id's downloads them."""
    if isinstance(source, str) and is_repo_id(source) and not Path(source).exists() and find(source, role=role).missing:
        raise CheckpointError(f"`{source}` is not in the local cache. Download it, or give its folder.")
    return open_checkpoint(source, role=role)


def _same_place(one: Source, other: Source) -> bool:
    paths = [Path(source) for source in (one, other) if isinstance(source, str | os.PathLike)]
    return len(paths) == 2 and all(path.exists() for path in paths) and paths[0].samefile(paths[1])


def _placed(own: dict[str, Tensor], rows: list[Candidate], kin: dict[int, dict[str, Tensor]]) -> None:
    """Tell kin apart by angles: independent changes are at right angles where their paths meet, and there alone."""
    middles: dict[int, list[bool]] = {at: [] for at in kin}
    for first in kin:
        for second in kin:
            if first == second:
                continue
            names = [name for name in own if name in kin[first] and name in kin[second]]
            count = {name: min(len(kin[first][name]), len(kin[second][name])) for name in names}
            if not names:
                middles[first].append(False)
                continue
            tuned, a, b = (
                flat({name: side[name][: count[name]] for name in names}, names)
                for side in (own, kin[first], kin[second])
            )
            at_a, at_b, at_tuned = cosine(tuned - a, b - a), cosine(tuned - b, a - b), cosine(a - tuned, b - tuned)
            if at_tuned < -0.95:
                for at, other in ((first, second), (second, first)):
                    rows[at].kind = "part of a merge"
                    rows[at].evidence = f"the fine-tune lies on the line to `{rows[other].name}`"
            right = abs(at_a) < _RIGHT and min(abs(at_b), abs(at_tuned)) > _SLANTED
            middles[first].append(right and len(tuned) >= _FEWEST)
    parents = [at for at, right in middles.items() if right and all(right) and rows[at].kind == "related"]
    if len(parents) != 1:
        return
    rows[parents[0]].kind = "parent"
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
    if len(kin) == 1:
        reason = f"`{kin[0].name}` alone is near: a parent or a sibling; a second relative would tell"
        return Whose(tuned, None, reason, rows)
    return Whose(tuned, None, "several are near and none is clearly between" if kin else "none is related", rows)
