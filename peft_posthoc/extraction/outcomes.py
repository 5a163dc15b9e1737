"""What became of a weight."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch import Tensor

from peft_posthoc.errors import AdapterError
from peft_posthoc.extraction.delta import Served
from peft_posthoc.linalg.lowrank import LowRank, Triplets
from peft_posthoc.linalg.noise import Noise


class Layer(NamedTuple):
    """One weight whose delta was factored."""

    weight: str
    factors: LowRank | Triplets
    """On the CPU; of a delta that is only looked at, what is known of its singular values."""
    base_norm: float
    seconds: float
    noise: Noise | None = None
    """What rounding put on the delta, where a rule asked and the saved type tells it."""
    signal: int | None = None
    """How many singular values stand out of the noise, among those that the factorization saw. None where no rule
    asked."""
    grid: tuple[float, float] | None = None
    """`||error||_F^2` that the grids of base and tuned are expected to have put on the delta; zero of one that is not
    quantised. None where neither is."""
    served: Served | None = None
    """How the base that is served differs from both, where that is another."""

    @property
    def lowrank(self) -> LowRank:
        """The factors.

        Raises:
            AdapterError: They were not kept.
        """
        if not isinstance(self.factors, LowRank):
            raise AdapterError("An adapter that was extracted with `keep_factors=False` has nothing to save.")
        return self.factors

    def without_factors(self) -> Layer:
        """The same, to be looked at and not to be saved."""
        return self._replace(factors=self.factors.triplets) if isinstance(self.factors, LowRank) else self


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
