"""Rank rules: how many singular triplets of a delta to keep.

A rule is a callable from what is known of a delta's spectrum to a rank. It may be asked while only the leading singular
values are known; an answer beyond the known ones means "go on", and the factorization grows and asks again. Those here
are small immutable objects, so that they print, compare and travel between processes. Rules that look at all layers
together are in `budget`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch

from peft_posthoc.linalg.noise import white
from peft_posthoc.linalg.spectrum import RankRule, Spectrum, in_advance
from peft_posthoc.ranks.sizing import HeldSizing, Sizing
from peft_posthoc.text import asked

_EPS = torch.finfo(torch.float32).eps


@runtime_checkable
class Allocation(Protocol):
    """A rule over all layers together. It is asked twice: how far to factor, and which ranks to keep of that."""

    def bounds(self, sizing: Sizing) -> Mapping[str, RankRule]:
        """By weight, how far to factor, from headers alone."""

    def choose(self, sizing: HeldSizing, by_hand: Collection[str] = ()) -> Mapping[str, int]:
        """By weight, the rank to keep.

        Args:
            sizing: With every layer as far as it was factored.
            by_hand: Weights whose rank is given, and stays.
        """


Rank: TypeAlias = "int | float | str | RankRule | Allocation"
"""How a rank is asked for: an int is a rank, a float in (0, 1] the share of the delta's energy, `"auto"` what stands
out of the delta's noise; or a rule, of one layer or of all together."""


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

    @property
    def known(self) -> int:
        """The rank, whatever the spectrum."""
        return self.rank

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
            meant = f" For {self.share:g} percent, give {self.share / 100:g}." if 2 <= self.share <= 100 else ""
            raise ValueError(f"An energy share must lie above 0 and be at most 1. Got {self.share!r}.{meant}")

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to keep; one more than is known, if that does not hold enough."""
        held = torch.cumsum(spectrum.s.double() ** 2, dim=0)
        # Sums of squares in floating point may fall short of the whole by rounding.
        goal = self.share * spectrum.energy * (1 - 1e-12)
        return min(int(torch.searchsorted(held, goal)) + 1, *spectrum.shape)


@dataclass(frozen=True)
class keep_error:
    """Keep the fewest triplets with a relative error `||delta - b @ a|| / ||delta||` of at most `error`.

    Raises:
        ValueError: `error` lies outside of [0, 1).
    """

    error: float

    def __post_init__(self) -> None:
        if not 0 <= self.error < 1:
            raise ValueError(f"A relative error must be at least 0 and below 1. Got {self.error!r}.")

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to keep; one more than is known, if the error is larger with all that is."""
        return keep_energy(1 - self.error**2)(spectrum)


@dataclass(frozen=True)
class above_noise:
    """Keep the triplets that stand out of the noise that the delta carries, and at least one.

    With `r` triplets kept, what is left bounds the noise from above; so does what rounding to the saved type can have
    put there, where that is known. The rank is the first `r` at which no value is left above the largest that such
    noise alone would have (Marchenko and Pastur, 1967). Nothing but the leading values and the total energy is needed.
    """

    measures_noise = True

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to keep; one more than is known, if all that are known stand out."""
        return max(signal_rank(spectrum), 1)


def signal_rank(spectrum: Spectrum) -> int:
    """How many singular values stand out of the noise; one more than are known, if all of these do."""
    m, n = spectrum.shape
    s = spectrum.s.double()
    kept = torch.arange(len(s), dtype=torch.float64)
    before = torch.cat([s.new_zeros(1), torch.cumsum(s**2, dim=0)[:-1]]) if len(s) else s
    # Without its `r` leading directions noise has (m - r)(n - r) of its m n degrees of freedom.
    freedom = ((m - kept) * (n - kept) / (m * n)).clamp(min=1e-300)
    # What is left is a difference of energies that are known to float32's precision.
    energy = (spectrum.energy - before).clamp(min=_EPS * spectrum.energy) / freedom
    if spectrum.noise is None:
        edge = energy.sqrt() * white(m, n)
    else:
        edge = energy.clamp(max=spectrum.noise.energy).sqrt() * spectrum.noise.edge
    # Singular values come as roots of the eigenvalues of a Gram matrix in float32.
    under = (s <= edge.clamp(min=math.sqrt(_EPS * spectrum.energy))).nonzero()
    return int(under[0]) if len(under) else min(len(s) + 1, m, n)


@dataclass(frozen=True)
class limited:
    """A rule's answer, no lower than `least`, no higher than `most`, and rounded up to a multiple of `multiple`.

    The smaller side of a delta goes before all of these, `most` before the other two.

    Raises:
        ValueError: They leave no rank.
    """

    rule: RankRule
    most: int | None = None
    least: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        check_limits(self.most, self.least, self.multiple)

    @property
    def measures_noise(self) -> bool:
        """Whether the rule within does."""
        return bool(getattr(self.rule, "measures_noise", False))

    @property
    def known(self) -> int | None:
        """The rank, where the rule within gives it whatever the spectrum."""
        rank = in_advance(self.rule)
        return None if rank is None else self.of(rank)

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to keep."""
        return min(self.of(self.rule(spectrum)), *spectrum.shape)

    def of(self, rank: int) -> int:
        """The rank within the limits."""
        rank = -(-max(rank, self.least) // self.multiple) * self.multiple
        return rank if self.most is None else min(rank, self.most // self.multiple * self.multiple)


@dataclass(frozen=True)
class several:
    """Rules that are to be had from one factorization: as a rule, the most that any of them keeps.

    Raises:
        ValueError: Two have the same name, or there is none.
    """

    named: tuple[tuple[str, RankRule], ...]
    """Each with a name, that of its adapter's folder."""

    def __post_init__(self) -> None:
        names = [name for name, _ in self.named]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"Of several ranks `{twice}` is asked for twice.")
        if not names:
            raise ValueError("Several ranks are asked for, and none is given.")

    @property
    def measures_noise(self) -> bool:
        """Whether one of them does."""
        return any(getattr(rule, "measures_noise", False) for _, rule in self.named)

    @property
    def known(self) -> int | None:
        """The highest rank, where all of them give theirs whatever the spectrum."""
        ranks = [rank for _, rule in self.named if (rank := in_advance(rule)) is not None]
        return max(ranks) if len(ranks) == len(self.named) else None

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to keep."""
        return max(rule(spectrum) for _, rule in self.named)


def check_limits(most: int | None, least: int, multiple: int) -> None:
    """Refuse limits that leave no rank.

    Raises:
        ValueError: They do.
    """
    for option, value in (("most", most), ("least", least), ("multiple", multiple)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{asked(option, None)}` must be a whole number of at least 1. Got {value!r}.")
    if most is not None and most < max(least, multiple):
        other = asked("least", least) if least > most else asked("multiple", multiple)
        raise ValueError(f"`{asked('most', most)}` is below `{other}`: no rank is left.")


def as_rule(rank: Rank) -> RankRule | Allocation:
    """An int is a rank, a float an energy share, as in PEFT's `convert_to_lora`; `"auto"` is `above_noise()`.

    Raises:
        ValueError: The rank is below 1, the share outside of (0, 1], or the word unknown.
    """
    if callable(rank) or isinstance(rank, Allocation):
        return rank
    if isinstance(rank, str):
        if rank != "auto":
            raise ValueError(f'A rank is a whole number, an energy share, a rule or "auto". Got {rank!r}.')
        return above_noise()
    return keep_energy(rank) if isinstance(rank, float) else fixed(rank)


def each(rank: Rank) -> RankRule:
    """The rule of one layer.

    Raises:
        ValueError: As `as_rule`; or the rule is one of all layers together.
    """
    rule = as_rule(rank)
    if isinstance(rule, Allocation):
        raise ValueError(f"{describe(rule)} shares ranks out among all layers: it is no rank of one.")
    return rule


def is_value(rule: object) -> bool:
    """Whether a rule, with all that it holds, says by its fields what it does: a function does not."""
    if isinstance(rule, tuple):
        return all(map(is_value, rule))
    return all(is_value(getattr(rule, one.name)) for one in fields(rule)) if is_dataclass(rule) else not callable(rule)


def describe(rule: RankRule | Allocation) -> str:
    """A rule in words that are the same in every process."""
    return getattr(rule, "__qualname__", None) or repr(rule)
