"""Norms, summed in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

# Values subtracted at a time: 1 MB of float32, which stay in the cache between the subtraction and the norms. With 4 MB
# the allocator keeps 100 MB more of what is freed, and it is no faster.
_CHUNK = 1 << 18


def frobenius(tensor: Tensor) -> float:
    """`||tensor||_F`, summed in float64."""
    return math.sqrt(sum(energy_of(chunk) for chunk in chunks(tensor)))


def chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """All values, in pieces that fit a cache."""
    return torch.split(tensor.reshape(-1), _CHUNK)


def energy_of(values: Tensor) -> float:
    """`||values||_F^2`, summed in float64."""
    if not values.dtype.is_floating_point:
        values = values.double()
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def frobenius_norm(x: Float[Tensor, "m n"]) -> float:
    """`||x||_F` of a matrix, summed in float64, without a copy of it."""
    # In slices: one reduction in float64 would first copy all of a float32 `x`.
    rows = x if x.stride(1) == 1 else x.mT
    squares = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square().sum() for part in rows.split(64)]
    return math.sqrt(float(torch.stack(squares).sum()))
