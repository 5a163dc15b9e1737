"""Norms, summed in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from peft_posthoc.compute.workers import spread

if TYPE_CHECKING:
    from jaxtyping import Float

# Values subtracted at a time: 256 KB of float32, which stay in the cache with twice as much in float64 for the norms.
# With a fourth or four times of that it is slower. A GPU has as much to do with 64 MB.
_CHUNK = 1 << 16
_CHUNK_OF_GPU = 1 << 24
# Chunks that one thread works on without a break: some 20 ms.
_CHUNKS = 256

R = TypeVar("R")


def frobenius(tensor: Tensor) -> float:
    """`||tensor||_F`, summed in float64."""
    return math.sqrt(energy_of(tensor))


def chunk(device: torch.device) -> int:
    """Values to work on at a time."""
    return _CHUNK if device.type == "cpu" else _CHUNK_OF_GPU


def chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """All values, in pieces that fit a cache."""
    return torch.split(tensor.reshape(-1), chunk(tensor.device))


def by_chunks(work: Callable[..., R], *tensors: Tensor, rooms: Sequence[torch.dtype] = ()) -> list[R]:
    """What is made of each chunk of tensors of one shape; on a CPU idle threads help with a large one.

    Args:
        work: Is given a chunk of each tensor, and the rooms.
        tensors: What there is.
        rooms: Types of tensors to write to, as large as a chunk. Made anew for each chunk they would pile up: glibc
            before 2.38 does not use again what it has aligned (0.9 GB for a weight of 14336 x 4096).
    """
    parts = list(zip(*map(chunks, tensors), strict=True))
    groups = [parts[start : start + _CHUNKS] for start in range(0, len(parts), _CHUNKS)]
    each = map if tensors[0].device.type != "cpu" else spread

    def of_group(group: list[tuple[Tensor, ...]]) -> list[R]:
        spare = [torch.empty_like(group[0][-1], dtype=dtype) for dtype in rooms]
        return [work(*part, *(one[: len(part[-1])] for one in spare)) for part in group]

    return [one for group in each(of_group, groups) for one in group]


def energy_of(tensor: Tensor) -> float:
    """`||tensor||_F^2`, summed in float64."""
    return sum_of_squares(by_chunks(norm_of, tensor, rooms=[torch.float64]))


def norm_of(values: Tensor, room: Tensor | None = None) -> Float[Tensor, ""]:
    """`||values||_F` of one chunk, where the values are; a room of float64 saves half of the time."""
    if room is not None:
        return torch.dot(room.copy_(values), room).sqrt()
    if not values.dtype.is_floating_point:
        values = values.double()
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm


def sum_of_squares(norms: Iterable[Float[Tensor, ""]]) -> float:
    """Of the norms of chunks. All are fetched at once: a GPU is waited for once."""
    found: list[float] = torch.stack(list(norms)).cpu().tolist()
    return sum(norm**2 for norm in found)


def frobenius_norm(x: Float[Tensor, "m n"]) -> float:
    """`||x||_F` of a matrix, summed in float64, without a copy of it."""
    # In slices: one reduction in float64 would first copy all of a float32 `x`.
    rows = x if x.stride(1) == 1 else x.mT
    squares = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square().sum() for part in rows.split(64)]
    return math.sqrt(float(torch.stack(squares).sum()))
