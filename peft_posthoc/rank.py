"""Rank rules: how many singular triplets of a delta to keep.

A rule is a callable from what is known of a delta's spectrum to a rank. It may be asked while only the leading singular
values are known; an answer beyond the known ones means "go on", and the factorization grows and asks again. Those here
are small immutable objects, so that they print, compare and travel between processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor


class Spectrum(NamedTuple):
    """What is known of the singular values of one delta."""

    s: Float[Tensor, " known"]
    """The leading singular values, in descending order, float64 on the CPU."""
    energy: float
    """`||delta||_F^2`: the true total, of the known and the unknown values."""
    shape: tuple[int, int]
    """`m` output features, `n` input features."""


RankRule = Callable[[Spectrum], int]

Rank: TypeAlias = "int | float | RankRule"
"""How a rank is asked for: an int is a rank, a float in (0, 1] the share of the delta's energy, or a rule."""


@dataclass(frozen=True)
class fixed:
    """Keep `rank` triplets of every delta, or all that a smaller one has.

    Raises:
        ValueError: `rank` is not a positive whole number.
    """

    rank: int

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"A rank must be a whole number of at least 1. Got {self.rank!r}.")

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to keep."""
        return min(self.rank, *spectrum.shape)


@dataclass(frozen=True)
class keep_energy:
    """Keep the fewest triplets that hold at least `share` of the delta's energy (E_r of PHLoRA, eq. 5).

    The share is of the true energy `||delta||_F^2`, not of that of the triplets computed so far.

    Raises:
        ValueError: `share` lies outside of (0, 1].
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"An energy share must lie above 0 and be at most 1. Got {self.share!r}.")

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to keep; one more than is known, if that does not hold enough."""
        held = torch.cumsum(spectrum.s.double() ** 2, dim=0)
        # Sums of squares in floating point may fall short of the whole by rounding.
        goal = self.share * spectrum.energy * (1 - 1e-12)
        return min(int(torch.searchsorted(held, goal)) + 1, *spectrum.shape)


def as_rule(rank: Rank) -> RankRule:
    """An int is a rank, a float an energy share, as in PEFT's `convert_to_lora`; a rule is itself.

    Raises:
        ValueError: The rank is below 1, or the share outside of (0, 1].
    """
    if callable(rank):
        return rank
    return keep_energy(rank) if isinstance(rank, float) else fixed(rank)


def describe(rule: RankRule) -> str:
    """A rule in words that are the same in every process."""
    return getattr(rule, "__qualname__", None) or repr(rule)
