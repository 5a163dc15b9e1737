"""What is known of a delta's singular values, and rules that look at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from peft_posthoc.linalg.noise import Noise

if TYPE_CHECKING:
    from jaxtyping import Float


class Spectrum(NamedTuple):
    """What is known of the singular values of one delta."""

    s: Float[Tensor, " known"]
    """The leading singular values, in descending order, float64 on the CPU."""
    energy: float
    """`||delta||_F^2`: the true total, of the known and the unknown values."""
    shape: tuple[int, int]
    """`m` output features, `n` input features."""
    noise: Noise | None = None
    """What rounding put on the delta, where a rule asked for it (`measures_noise`) and the saved type tells it."""
    base_norm: float | None = None
    """`||base||_F`; None of a delta that is no difference of two weights, such as an adapter's own."""


RankRule = Callable[[Spectrum], int]


def in_advance(rule: RankRule) -> int | None:
    """The rank that a rule gives whatever the spectrum, but for a delta's smaller side; None if it looks at it."""
    known: int | None = getattr(rule, "known", None)
    return known
