"""One weight: the pair before and after, their delta, its factors; or what is lost by leaving it out."""

from __future__ import annotations

import math
import time
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from peft_posthoc.errors import CheckpointError
from peft_posthoc.layout import Place
from peft_posthoc.rank import RankRule
from peft_posthoc.svd import LowRank, truncated_svd


class Pair(NamedTuple):
    """One weight before and after. Either is None where only the other checkpoint has it."""

    name: str
    base: Tensor | None
    tuned: Tensor | None


class Layer(NamedTuple):
    """One weight whose delta was factored."""

    weight: str
    places: tuple[Place, ...]
    factors: LowRank
    base_norm: float
    seconds: float


class Skipped(NamedTuple):
    """One weight that the adapter does not carry."""

    weight: str
    reason: str
    delta_norm: float | None
    """`||tuned - base||_F`: what is lost. None where there is no difference to take."""
    base_norm: float | None
    seconds: float

    @property
    def unchanged(self) -> bool:
        """Whether nothing is lost by leaving it out."""
        return self.delta_norm == 0


def factor(
    pair: Pair, places: tuple[Place, ...], rule: RankRule, *, exact: bool = False, device: torch.device | None = None
) -> Layer | Skipped:
    """Factor one weight's delta.

    Args:
        pair: The weight in both checkpoints, of one shape.
        places: Where it lives; the first one's kind says how it becomes a matrix.
        rule: How many singular triplets to keep.
        exact: Use LAPACK's full SVD.
        device: Where to work.

    Returns:
        Its layer; `Skipped` if nothing changed.

    Raises:
        CheckpointError: A value is NaN or infinite.
    """
    start = time.perf_counter()
    delta, skipped = _measure(pair, "unchanged", start, device)
    if delta is None or skipped.delta_norm == 0:
        return skipped
    try:
        # The seed depends on the name alone: same inputs, same factors, in whatever order weights come.
        factors = truncated_svd(places[0].kind.matrix(delta), rule, exact=exact, seed=zlib.crc32(pair.name.encode()))
    except Exception as error:
        error.add_note(f"While extracting `{pair.name}`.")
        raise
    return Layer(pair.name, places, factors, skipped.base_norm or 0.0, time.perf_counter() - start)


def leave_out(pair: Pair, reason: str, *, device: torch.device | None = None) -> Skipped:
    """Measure what is lost by not carrying one weight.

    Raises:
        CheckpointError: A value is NaN or infinite.
    """
    return _measure(pair, reason, time.perf_counter(), device)[1]


def _measure(pair: Pair, reason: str, start: float, device: torch.device | None) -> tuple[Tensor | None, Skipped]:
    base_norm = None if pair.base is None else frobenius(pair.base)
    delta, delta_norm = None, None
    if pair.base is not None and pair.tuned is not None and pair.base.shape == pair.tuned.shape:
        delta = difference(pair.base, pair.tuned, device=device)
        delta_norm = frobenius(delta)
    if not all(math.isfinite(norm) for norm in (base_norm, delta_norm) if norm is not None):
        raise CheckpointError(_not_finite(pair))
    return delta, Skipped(pair.name, reason, delta_norm, base_norm, time.perf_counter() - start)


def difference(base: Tensor, tuned: Tensor, *, device: torch.device | None = None) -> Tensor:
    """`tuned - base` in float32, or float64 where one of them is: the only subtraction in the project."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(base.dtype, tuned.dtype))
    return tuned.to(device, dtype) - base.to(device, dtype)


def frobenius(tensor: Tensor) -> float:
    """`||tensor||_F`, summed in float64."""
    if not tensor.dtype.is_floating_point:
        tensor = tensor.double()
    # In chunks: a float64 copy of a whole weight would be the largest thing in memory.
    chunks = tensor.reshape(-1).split(1 << 20)
    squares = [torch.linalg.vector_norm(chunk, dtype=torch.float64) ** 2 for chunk in chunks if chunk.numel()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _not_finite(pair: Pair) -> str:
    for role, tensor in (("base", pair.base), ("tuned", pair.tuned)):
        if tensor is not None and not (good := torch.isfinite(tensor)).all():
            count = f"{int((~good).sum())} of {good.numel()} values"
            return f"The {role} checkpoint holds NaN or infinity in `{pair.name}` ({count})."
    return f"The difference of base and tuned overflows in `{pair.name}`."
