"""A few kilobytes of a checkpoint: corners of some of its weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import CheckpointError

_WEIGHTS = 8
_EDGE = 64


def chosen(checkpoint: Checkpoint) -> list[str]:
    """Names of some matrices, from all over the model."""
    heads = sorted(checkpoint.headers.items())
    names = [name for name, (shape, dtype) in heads if len(shape) == 2 and min(shape) > 1 and dtype.is_floating_point]
    return [names[at * len(names) // _WEIGHTS] for at in range(_WEIGHTS)] if len(names) > _WEIGHTS else names


def corners(checkpoint: Checkpoint, names: list[str]) -> dict[str, Tensor]:
    """The first rows and columns of each of the weights that the checkpoint has.

    Raises:
        CheckpointError: It would have to be downloaded, or has a value that is not finite.
    """
    if checkpoint.to_fetch:
        raise CheckpointError(f"`{checkpoint.label}` is not in the local cache. Download it, or give its folder.")
    found = {}
    for name in names:
        if name in checkpoint.headers and len(checkpoint.headers[name].shape) == 2:
            found[name] = checkpoint.read(name)[:_EDGE, :_EDGE].clone()
            if not found[name].double().isfinite().all():
                raise CheckpointError(f"`{checkpoint.label}` has a value in `{name}` that is not finite.")
    return found


def flat(corners: Mapping[str, Tensor], names: list[str]) -> Tensor:
    """The values of these corners, as one float64 vector."""
    return torch.cat([corners[name].double().flatten() for name in names])


def rounded_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two corners are the same values, up to the rounding of the coarser type."""
    coarse = max((one.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    # What went through float16 and bfloat16 both was rounded twice, and float16 has a smallest step.
    return torch.allclose(one.double(), other.double(), rtol=torch.finfo(coarse).eps, atol=1e-7)
