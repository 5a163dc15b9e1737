"""What became of a weight."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch import Tensor

from peft_posthoc.linalg.lowrank import LowRank
from peft_posthoc.linalg.noise import Noise


class Layer(NamedTuple):
    """One weight whose delta was factored."""

    weight: str
    factors: LowRank
    """On the CPU."""
    base_norm: float
    seconds: float
    noise: Noise | None = None
    """What rounding put on the delta, where a rule asked and the saved type tells it."""
    signal: int | None = None
    """How many singular values stand out of the noise, among those that the factorization saw. None where no rule
    asked."""


class Skipped(NamedTuple):
    """One weight that the adapter does not carry."""

    weight: str
    reason: str
    delta_norm: float | None
    """`||tuned - base||_F`: what is lost. None where there is no difference to take."""
    base_norm: float | None
    tuned_norm: float | None
    """`||tuned||_F`, where there is no difference to take."""
    seconds: float


class Kept(NamedTuple):
    """One tensor that is in the file without factors: as it is, or of a bias its difference."""

    weight: str
    value: Tensor
    """On the CPU."""
    delta_norm: float
    base_norm: float
    seconds: float


Outcome: TypeAlias = Layer | Skipped | Kept
