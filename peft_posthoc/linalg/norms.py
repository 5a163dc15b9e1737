"""Norms, summed in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from peft_posthoc.compute.workers import spread

if TYPE_CHECKING:
    from jaxtyping import Float

# Values subtracted at a time: 1 MB of float32, which stay in the cache between the subtraction and the norms. With 4 MB
# the allocator keeps 100 MB more of what is freed, and it is no faster. A GPU has as much to do with 64 MB.
_CHUNK = 1 << 18
_CHUNK_OF_GPU = 1 << 24
# Chunks that one thread works on without a break: some 20 ms.
_CHUNKS = 64

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


def by_chunks(work: Callable[..., R], *tensors: Tensor) -> list[R]:
    """What is made of each chunk of tensors of one shape; on a CPU idle threads help with a large one."""
    parts = list(zip(*map(chunks, tensors), strict=True))
    groups = [parts[start : start + _CHUNKS] for start in range(0, len(parts), _CHUNKS)]
    each = map if tensors[0].device.type != "cpu" else spread
    return [one for group in each(lambda group: [work(*part) for part in group], groups) for one in group]


def energy_of(tensor: Tensor) -> float:
    """`||tensor||_F^2`, summed in float64."""
    return sum_of_squares(by_chunks(norm_of, tensor))


def norm_of(values: Tensor) -> Float[Tensor, ""]:
    """`||values||_F` of one chunk, where the values are."""
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
