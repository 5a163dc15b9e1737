"""Rank rules: how many singular triplets of a delta to keep.

A rule is a plain callable from what is known of a delta's spectrum to a rank. It may be asked while only the leading
singular values are known; an answer beyond the known ones means "go on", and the factorization grows and asks again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


def fixed(rank: int) -> RankRule:
    """Keep `rank` triplets of every delta, or all that a smaller one has.

    Raises:
        ValueError: `rank` is not a positive whole number.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"A rank must be a whole number of at least 1. Got {rank!r}.")
    return lambda spectrum: min(rank, *spectrum.shape)


def keep_energy(share: float) -> RankRule:
    """Keep the fewest triplets that hold at least `share` of the delta's energy (E_r of PHLoRA, eq. 5).

    Args:
        share: From above 0 to 1, of the true energy `||delta||_F^2`.

    Raises:
        ValueError: `share` lies outside of (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"An energy share must lie above 0 and be at most 1. Got {share!r}.")

    def rule(spectrum: Spectrum) -> int:
        held = torch.cumsum(spectrum.s.double() ** 2, dim=0)
        # Sums of squares in floating point may fall short of the whole by rounding.
        goal = share * spectrum.energy * (1 - 1e-12)
        needed = int(torch.searchsorted(held, goal)) + 1
        return min(max(needed, 1), *spectrum.shape)

    return rule


def as_rule(rank: int | float | RankRule) -> RankRule:
    """An int is a rank, a float an energy share, as in PEFT's `convert_to_lora`; a rule is itself.

    Raises:
        ValueError: The rank is below 1, or the share outside of (0, 1].
    """
    if callable(rank):
        return rank
    return keep_energy(rank) if isinstance(rank, float) else fixed(rank)
