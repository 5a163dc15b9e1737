"""The only subtraction in the project."""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from peft_posthoc.compute.device import moved
from peft_posthoc.errors import CheckpointError
from peft_posthoc.linalg.norms import by_chunks, energy_of, norm_of, sum_of_squares


class Pair(NamedTuple):
    """One weight before and after. Either is None where only the other checkpoint has it."""

    name: str
    base: Tensor | None
    tuned: Tensor | None
    served: Tensor | None = None
    """What the base that the adapter is served on has in its place, where that is another."""
    steps: tuple[Tensor | None, Tensor | None] = (None, None)
    """Of base and tuned, as far as they are quantised: the grid's step at each value."""

    @property
    def bytes(self) -> int:
        """Of one of them."""
        return next(one.nbytes for one in (self.tuned, self.base) if one is not None)

    def on(self, device: torch.device) -> Self:
        """The same on a device, where all that is made of it is made too."""
        base, tuned, served, *steps = (None if one is None else moved(one, device) for one in (*self[1:4], *self.steps))
        return self._replace(base=base, tuned=tuned, served=served, steps=(steps[0], steps[1]))


class Delta(NamedTuple):
    """The difference of two weights, and the norms that were taken on the way."""

    values: Tensor
    norm: float
    base_norm: float


def difference(pair: Pair) -> Delta:
    """`tuned - base` in float32, or float64 where one of them is: the only subtraction in the project.

    Args:
        pair: Two tensors of one shape, on the device where the result will be.

    Raises:
        CheckpointError: A value is NaN or infinite, and not the same in both.
    """
    base, tuned = pair.base, pair.tuned
    if base is None or tuned is None:
        raise ValueError(f"`difference(pair=...)` needs both weights; `{pair.name}` is in one checkpoint only.")
    dtype = torch.promote_types(torch.float32, torch.promote_types(base.dtype, tuned.dtype))
    values = torch.empty(tuned.shape, dtype=dtype, device=tuned.device)

    def subtract(before: Tensor, after: Tensor, out: Tensor, wide: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        wide.copy_(before)
        out.copy_(after).sub_(wide)
        return norm_of(out, room), norm_of(wide, room)

    norms = by_chunks(subtract, base, tuned, values, rooms=[dtype, torch.float64])
    delta_energy, base_energy = map(sum_of_squares, zip(*norms, strict=True))
    if not (math.isfinite(delta_energy) and math.isfinite(base_energy)):
        if not _same(base, tuned):
            raise CheckpointError(not_finite(pair))
        # A bound that is infinite, a mask: it stays as it is in the base.
        finite = torch.nan_to_num(base.to(dtype), nan=0.0, posinf=0.0, neginf=0.0)
        return Delta(values.zero_(), 0.0, math.sqrt(energy_of(finite)))
    return Delta(values, math.sqrt(delta_energy), math.sqrt(base_energy))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, NaN in the same places."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def not_finite(pair: Pair) -> str:
    """Which values of a pair, or of its difference, are NaN or infinite."""
    for role, tensor in (("base", pair.base), ("tuned", pair.tuned)):
        if tensor is not None and not (good := torch.isfinite(tensor)).all():
            count = f"{int((~good).sum())} of {good.numel()} values"
            return f"The {role} checkpoint holds NaN or infinity in `{pair.name}` ({count})."
    return f"The difference of base and tuned overflows in `{pair.name}`."


class Served(NamedTuple):
    """What quantising the base did to a weight, and what then separates it from the tuned one."""

    error: float
    """`||served - base||_F`."""
    delta: float
    """`||tuned - served||_F`: the total delta."""


def served(pair: Pair) -> Served | None:
    """Compare both weights of a pair with that of the base that is served; None where there is none."""
    if pair.base is None or pair.tuned is None or pair.served is None:
        return None

    def apart(before: Tensor, after: Tensor, quantised: Tensor) -> tuple[Tensor, Tensor]:
        quantised = quantised.float()
        return norm_of(quantised - before.float()), norm_of(after.float() - quantised)

    norms = by_chunks(apart, pair.base, pair.tuned, pair.served)
    return Served(*(math.sqrt(sum_of_squares(each)) for each in zip(*norms, strict=True)))
