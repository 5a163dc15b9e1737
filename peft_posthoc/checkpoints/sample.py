"""A few kilobytes of a checkpoint: corners of some weights of each kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.streamed import Streamed
from peft_posthoc.checkpoints.view import View
from peft_posthoc.errors import CheckpointError

T = TypeVar("T")

_WEIGHTS, _KINDS = 8, 12
# What is decoded is decoded whole, for a corner too.
_LARGE = 2**26
# Share of values that are the same where some were rounded twice.
_SAME = 0.98
_NUMBER = re.compile(r"\d+")
SQUARE = (64, 64)
"""Rows and columns of a corner."""
FLAT = (16, 256)
"""As many values of fewer rows: fewer bytes where whole rows are fetched."""


def chosen(checkpoint: Checkpoint) -> list[str]:
    """Names of some matrices: of each kind, names that differ in numbers alone, from another depth of the model."""
    heads = sorted(checkpoint.headers.items())
    names = [name for name, (shape, dtype) in heads if len(shape) == 2 and min(shape) > 1 and dtype.is_floating_point]
    small = [name for name in names if torch.Size(checkpoint.headers[name].shape).numel() <= _LARGE]
    kinds: dict[str, list[str]] = {}
    for name in small or names:
        kinds.setdefault(_NUMBER.sub("#", name), []).append(name)
    some = _spread(list(kinds.values()), _KINDS)
    each = -(-_WEIGHTS // max(len(some), 1))
    turned = ((kind, at % len(kind)) for at, kind in enumerate(some))
    return [name for kind, at in turned for name in _spread([*kind[at:], *kind[:at]], each)]


def _spread(items: Sequence[T], most: int) -> Sequence[T]:
    return [items[at * len(items) // most] for at in range(most)] if len(items) > most else items


def corners(checkpoint: Checkpoint, names: Iterable[str], edge: tuple[int, int] = SQUARE) -> dict[str, Tensor]:
    """The first rows and columns of each of the weights that the checkpoint has.

    Raises:
        CheckpointError: It would have to be downloaded, or has a value that is not finite.
    """
    if checkpoint.to_fetch:
        raise CheckpointError(f"`{checkpoint.label}` is not in the local cache. Download it, or give its folder.")
    found = {}
    for name in names:
        if name in checkpoint.headers and len(checkpoint.headers[name].shape) == 2:
            found[name] = _rows(checkpoint, name, edge[0])[:, : edge[1]].cpu().clone()
            if not found[name].double().isfinite().all():
                raise CheckpointError(f"`{checkpoint.label}` has a value in `{name}` that is not finite.")
    return found


def _rows(checkpoint: Checkpoint, name: str, count: int) -> Tensor:
    while isinstance(checkpoint, View) and checkpoint.is_as_it_is(name):
        (name,) = checkpoint.sources(name)
        checkpoint = checkpoint.seen
    return (checkpoint.rows(name, count) if isinstance(checkpoint, Streamed) else checkpoint.read(name))[:count]


def flat(corners: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """The values of these corners, as one float64 vector."""
    return torch.cat([corners[name].double().flatten() for name in names])


def rounded_alike(one: Tensor, other: Tensor) -> bool:
    """Tell whether two corners are the same values, but for a rounding of one to a coarser type than it has."""
    if one.dtype == other.dtype and torch.equal(one, other):
        return True
    for dtype in {one.dtype, other.dtype, torch.bfloat16, torch.float16}:
        for coarse, fine in ((one, other), (other, one)):
            if torch.finfo(fine.dtype).eps >= torch.finfo(dtype).eps or not torch.equal(
                coarse.double(), coarse.to(dtype).double()
            ):
                continue
            rounded = fine.to(dtype)
            # What went through float16 and bfloat16 both was rounded twice, and float16 has a smallest step.
            same = (rounded == coarse.to(dtype)) | ((fine.double() - coarse.double()).abs() <= 1e-7)
            if same.double().mean() > _SAME:
                return True
    return False
