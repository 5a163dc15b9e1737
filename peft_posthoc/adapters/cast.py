"""Factors to the type that they are saved in: the one place that rounds them, and that sees what rounding loses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_posthoc.adapters.factors import Factors
from peft_posthoc.errors import AdapterError
from peft_posthoc.text import asked

if TYPE_CHECKING:
    from jaxtyping import Float

# Powers of two that a pair is moved by, out of balance, in search of a type's own range: float16 has 40.
_MOVES = range(-40, 41)


def cast(
    a: Float[Tensor, "r n"], b: Float[Tensor, "m r"], dtype: torch.dtype, name: str, *, rank: int | None = None
) -> Factors:
    """The factors of one matrix in a type, with the same product but for rounding.

    Where they are smaller than the type's normal numbers, each row of `a` and its column of `b` are moved against each
    other by a power of two: that is exact.

    Args:
        a: Its rows are the first ones of what comes back.
        b: Its columns are.
        dtype: To cast to.
        name: What messages call the matrix.
        rank: To pad with zeros to; their own if None.

    Returns:
        New tensors, which share memory with nothing.

    Raises:
        AdapterError: The type does not hold a factor, or so little of the product that the adapter would be another.
    """
    own, rank = len(a), len(a) if rank is None else rank
    saved = Factors(a, b).padded(rank, dtype)
    if _overflow(a, saved.a[:own]) or _overflow(b, saved.b[:, :own]):
        raise AdapterError(f"The factors of `{name}` overflow {dtype}. {_another()}")
    if (a.dtype, b.dtype) == (dtype, dtype) or _only_rounded(a, b, dtype):
        return saved
    if not _held(a, b, saved.a[:own], saved.b[:, :own]):
        wide = _balanced(a.double(), b.double(), dtype)
        saved = Factors(*wide).padded(rank, dtype)
        if not _held(*wide, saved.a[:own], saved.b[:, :own]):
            raise AdapterError(
                f"The factors of `{name}` are too small for {dtype}: they would be another delta, or none. {_another()}"
            )
    return saved


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The type that holds what each of these does, of those that adapters are saved in."""
    # PyTorch promotes no types of eight bits, and no engine computes with them.
    first, *others = sorted({dtype if dtype.itemsize > 1 else torch.float32 for dtype in dtypes}, key=str)
    for other in others:
        first = torch.promote_types(first, other)
    return torch.float32 if first is torch.float64 else first


def cast_biases(biases: Mapping[str, Float[Tensor, " m"]], dtype: torch.dtype) -> dict[str, Float[Tensor, " m"]]:
    """Sums for the biases of modules, in a type.

    One that is nothing beside the others may be nothing in the type: of a key's bias, softmax sees nothing, and so
    training moves it by rounding alone.

    Raises:
        AdapterError: The type does not hold one of them, or none.
    """
    saved = {name: bias.to(dtype, copy=True) for name, bias in biases.items()}
    for name, bias in biases.items():
        if _overflow(bias, saved[name]):
            raise AdapterError(f"The bias of `{name}` overflows {dtype}. {_another()}")
    size, lost = (
        math.hypot(*(float(torch.linalg.vector_norm(value.double())) for value in values))
        for values in (biases.values(), [saved[name].double() - bias.double() for name, bias in biases.items()])
    )
    if lost > 2 * torch.finfo(dtype).eps * size:
        raise AdapterError(f"The biases are too small for {dtype}: they would be none. {_another()}")
    return saved


def _another() -> str:
    return f"Choose another `{asked('dtype', None)}`."


def _overflow(x: Tensor, saved: Tensor) -> bool:
    limit = torch.finfo(saved.dtype)
    most = float(torch.linalg.vector_norm(x, math.inf)) if x.numel() else 0.0
    # Between the two what rounds up is lost. PyTorch does not compute with float8, and cuts at some types' maximum.
    return not most <= limit.max and (
        not most <= limit.max * (1 + limit.eps) or not bool(torch.isfinite(saved.float()).all())
    )


def _only_rounded(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a type must hold the product, by the most that rounding can change: `_held` in a pass over each."""
    limit = torch.finfo(dtype)
    norms = [torch.linalg.vector_norm(x, dim=dim).double() for x, dim in ((a, 1), (b, 0))]
    least = limit.smallest_normal * limit.eps / 2  # what rounding does to numbers below the normal ones
    offs = [
        limit.eps / 2 * norm + least * math.sqrt(count) for norm, count in zip(norms, (a.shape[1], len(b)), strict=True)
    ]
    return _within(norms[0] * norms[1], offs[0] * norms[1] + norms[0] * offs[1] + offs[0] * offs[1], limit.eps)


def _held(a: Tensor, b: Tensor, saved_a: Tensor, saved_b: Tensor) -> bool:
    """Tell whether a type holds the product up to its rounding."""
    if not len(a):
        return True
    return _within(*_sizes(a, b, saved_a, saved_b), torch.finfo(saved_a.dtype).eps)


def _within(size: Tensor, lost: Tensor, eps: float) -> bool:
    """Tell whether what is lost is no more than rounding, which changes each factor by at most half of `eps`."""
    return float(torch.linalg.vector_norm(lost)) <= 2 * eps * float(torch.linalg.vector_norm(size))


def _sizes(a: Tensor, b: Tensor, saved_a: Tensor, saved_b: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of the product of every row of `a` with its column of `b`, and bounds on what casting changed."""
    sizes, losses = [], []
    for start in range(0, len(a), 64):  # Copies in float64 of all at once would be as large as the delta.
        part = slice(start, start + 64)
        norms = [
            (torch.linalg.vector_norm(wide, dim=dim), torch.linalg.vector_norm(saved.double() - wide, dim=dim))
            for wide, saved, dim in (
                (a[part].double(), saved_a[part], 1),
                (b[:, part].double(), saved_b[:, part], 0),
            )
        ]
        (of_a, off_a), (of_b, off_b) = norms
        sizes.append(of_a * of_b)
        losses.append(off_a * of_b + of_a * off_b + off_a * off_b)
    return torch.cat(sizes), torch.cat(losses)


def _balanced(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row of `a` and its column of `b`, moved by the power of two with which the type loses least."""
    best = torch.full((len(a),), float("inf"), dtype=torch.float64)
    powers = torch.zeros(len(a), dtype=torch.int64)
    for power in sorted(_MOVES, key=abs):
        moved = a * 2.0**power, b * 2.0**-power
        _, lost = _sizes(*moved, *(x.to(dtype) for x in moved))
        better = lost < best  # Never where something overflows: infinity, or no number.
        best, powers = torch.where(better, lost, best), torch.where(better, power, powers)
    return torch.ldexp(a, powers[:, None]), torch.ldexp(b, -powers)
