"""What `parameters:` may say of `merge_method: phlora`, for one weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from mergekit.merge_methods import ParameterScope
from mergekit.merge_methods.base import ParameterSpec
from pydantic import Field

from peft_posthoc.rank import RankRule, fixed, keep_energy

# Of the non-base input: mergekit then looks for a value at the model too, then at the slice, the module and the top.
PARAMETERS = tuple(
    ParameterSpec(name, of, ParameterScope.NON_BASE, default)
    for name, of, default in (
        # A float, because a gradient over layers gives one between two numbers.
        ("rank", Annotated[float, Field(ge=0, allow_inf_nan=False)] | None, None),
        ("energy", Annotated[float, Field(gt=0, le=1)] | None, None),
        ("rest", Literal["base", "tuned"], "base"),
        ("embeddings", bool, False),
        ("head", bool, False),
        ("exact", bool, False),
    )
)


@dataclass(frozen=True)
class Settings:
    """The values of one weight: filters and gradients have been worked out.

    Raises:
        ValueError: Both a rank and an energy are given.
    """

    rank: float | None
    """Singular triplets to keep; 0: not carried."""
    energy: float | None
    """Or: keep the fewest that hold this share of the delta's energy."""
    rest: Literal["base", "tuned"]
    """Where a weight comes from that is not carried."""
    embeddings: bool
    head: bool
    exact: bool

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise ValueError("`parameters` of `merge_method: phlora` give both `rank` and `energy`. Give one of them.")

    @property
    def rule(self) -> RankRule | None:
        """The rank rule; None if the weight is not to be carried."""
        if self.energy is not None:
            return keep_energy(self.energy)
        rank = 32 if self.rank is None else round(self.rank)
        return fixed(rank) if rank else None
