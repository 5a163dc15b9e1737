"""One candidate beside a fine-tune: how near corners of their weights are, and what that makes of the candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.sample import SQUARE, corners, flat, rounded_alike

# Relative distance from which two models are strangers (independent ones are at 1.4), and to which they are kin.
_STRANGE, _KIN = 1.0, 0.5


@dataclass
class Candidate:
    """One candidate and what it is to the fine-tune."""

    name: str
    kind: str
    """`itself`, `copy`, `quantised copy`, `parent`, `copy of the parent`, `sibling or grandparent`, `part of a merge`,
    `related`, `unrelated`, `unsure`, `other architecture` or `failed`."""
    evidence: str
    distance: float | None = None
    """Of the sampled values, relative to the candidate's."""
    equal: float | None = None
    """Share of the sampled values that are the same."""
    rank: int | None = None
    """Of the difference, where it is low as that of a merged LoRA is."""


def compared(
    after: Checkpoint,
    own: Mapping[str, Tensor],
    before: Checkpoint,
    *,
    same: bool = False,
    edge: tuple[int, int] = SQUARE,
) -> tuple[Candidate, dict[str, Tensor] | None]:
    """What one candidate is by itself, and its corners; `related` is looked at again beside the others.

    Args:
        after: The fine-tune.
        own: Its corners.
        before: The candidate.
        same: Whether it is the fine-tune itself.
        edge: Of the corners.
    """
    label = before.label
    if same:
        return Candidate(label, "itself", "it is the same place"), None
    heads = {name: before.headers[name].shape for name in own if name in before.headers}
    # The vocabulary may have been resized: columns decide.
    fit = [name for name, shape in heads.items() if len(shape) == 2 and shape[1] == after.headers[name].shape[1]]
    if len(fit) * 2 < len(own):
        return Candidate(label, "other architecture", f"{len(fit)} of {len(own)} sampled weights fit"), None
    sample = corners(before, fit, edge)
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
        rounded_alike(mine[name], sample[name]) or on_grid(mine[name], sample[name], after.steps(name)) for name in fit
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


def cosine(one: Tensor, other: Tensor) -> float:
    """Of two vectors; none where one is zero."""
    return float(one @ other / (one.norm() * other.norm()).clamp_min(1e-300))


def on_grid(mine: Tensor, theirs: Tensor, steps: Tensor | None) -> bool:
    """Tell whether one corner is another one rounded to a grid, its rows or all of it with one step.

    Args:
        mine: The corner.
        theirs: The other one.
        steps: Of the whole weight, the grid's step at each value, where it is known.
    """
    error = (mine.double() - theirs.double()).abs()
    eps = torch.finfo(mine.dtype).eps
    if steps is not None:
        # Grids are uneven, and cut off what is beyond their ends: nearly all is enough.
        near = 0.51 * steps[: len(mine), : mine.shape[1]].double()
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
