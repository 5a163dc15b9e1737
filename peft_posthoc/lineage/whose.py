"""`whose`: which of several candidates a fine-tune was made from, from corners of a few weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.hub import find, is_repo_id
from peft_posthoc.errors import CheckpointError, PosthocError, one_line
from peft_posthoc.lineage.sample import chosen, corners, flat, rounded_alike
from peft_posthoc.sources import Source, open_checkpoint

# Relative distance from which two models are strangers (independent ones are at 1.4), and to which they are kin.
_STRANGE, _KIN = 1.0, 0.5
# A cosine that is none, and one that is clearly some; two chance directions in these samples are far below the first.
_RIGHT, _SLANTED = 0.05, 0.1
# A sample in which chance alone makes cosines of a third of that says nothing of angles.
_FEWEST = 4000


@dataclass
class Candidate:
    """One candidate and what it is to the fine-tune."""

    name: str
    kind: str
    """`itself`, `copy`, `quantised copy`, `parent`, `sibling or grandparent`, `part of a merge`, `related`,
    `unrelated`, `unsure`, `other architecture` or `failed`."""
    evidence: str
    distance: float | None = None
    """Of the sampled values, relative to the candidate's."""
    equal: float | None = None
    """Share of the sampled values that are the same."""
    rank: int | None = None
    """Of the difference, where it is low as that of a merged LoRA is."""


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
            row, sample = _compared(after, own, before, same=source is tuned or _same_place(tuned, source))
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


def _compared(
    after: Checkpoint, own: dict[str, Tensor], before: Checkpoint, *, same: bool
) -> tuple[Candidate, dict[str, Tensor] | None]:
    """What one candidate is by itself; `related` is looked at again beside the others."""
    label = before.label
    if same:
        return Candidate(label, "itself", "it is the same place"), None
    heads = {name: before.headers[name].shape for name in own if name in before.headers}
    # The vocabulary may have been resized: columns decide.
    fit = [name for name, shape in heads.items() if len(shape) == 2 and shape[1] == after.headers[name].shape[1]]
    if len(fit) * 2 < len(own):
        return Candidate(label, "other architecture", f"{len(fit)} of {len(own)} sampled weights fit"), None
    sample = corners(before, fit)
    for name, corner in sample.items():
        rows = min(len(corner), len(own[name]))
        sample[name] = corner[:rows]
    mine = {name: own[name][: len(sample[name])] for name in fit}
    one, other = flat(mine, fit), flat(sample, fit)
    distance = float((one - other).norm() / other.norm().clamp_min(1e-300))
    equal = float((one == other).double().mean())
    row = Candidate(label, "related", f"distance {distance:.2g}, {equal:.0%} of the values the same", distance, equal)
    if all(rounded_alike(mine[name], sample[name]) for name in fit):
        row.kind = "copy"
        row.evidence = "the same values, up to the rounding of their type"
    elif all(
        rounded_alike(mine[name], sample[name]) or _on_grid(after, name, mine[name], sample[name]) for name in fit
    ):
        row.kind, row.evidence = "quantised copy", "each value is the candidate's, rounded to a grid"
    elif distance > _STRANGE:
        row.kind = "unrelated"
    elif distance > _KIN:
        row.kind = "unsure"
        row.evidence += ", too far for a fine-tune and too near for a stranger"
    else:
        row.rank = _low_rank(mine, sample)
        if row.rank:
            row.evidence += f", a difference of rank {row.rank} as merged LoRA has"
    return row, sample


def _on_grid(after: Checkpoint, name: str, mine: Tensor, theirs: Tensor) -> bool:
    """Whether one corner is another one rounded to a grid, its rows or all of it with one step."""
    error = (mine.double() - theirs.double()).abs()
    eps = torch.finfo(mine.dtype).eps
    if (steps := after.steps(name)) is not None:
        # Grids are uneven, and cut off what is beyond their ends: nearly all is enough.
        near = 0.51 * steps.expand(after.headers[name].shape)[: len(mine), : mine.shape[1]].double()
        return float((error <= near + eps * mine.double().abs()).double().mean()) > 0.9
    for row, off in zip(mine.double(), error, strict=True):
        gaps = row.unique().diff()
        gaps = gaps[gaps > 4 * eps * row.abs().max()]
        if not len(gaps) or len(gaps) + 1 == len(row) > 64:
            return False
        tried = [float(gaps.min()) / part for part in (1, 2, 3)]
        # A step near the type's own rounding would fit anything.
        fits = [step for step in tried if step > 64 * eps * float(row.abs().max())]
        if not any(
            ((row / step) - (row / step).round()).abs().max() < 0.02 and off.max() <= 0.51 * step for step in fits
        ):
            return False
    return True


def _low_rank(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> int | None:
    """The highest rank of the differences' corners, if each is low beyond rounding."""
    ranks = []
    for name, corner in theirs.items():
        delta = mine[name].double() - corner.double()
        noise = max(torch.finfo(mine[name].dtype).eps, torch.finfo(corner.dtype).eps)
        floor = float((corner.double() * noise).square().sum()) / 6
        energy = torch.linalg.svdvals(delta).square()
        tails = energy.flip(0).cumsum(0).flip(0)
        rank = int((tails > max(floor, 1e-10 * float(tails[0]))).sum())
        if rank * 3 > min(delta.shape):
            return None
        ranks.append(rank)
    return max(ranks, default=0) or None


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
            at_a, at_b, at_tuned = _cosine(tuned - a, b - a), _cosine(tuned - b, a - b), _cosine(a - tuned, b - tuned)
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


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()).clamp_min(1e-300))


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
