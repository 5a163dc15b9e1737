"""Values of `parameters:` for `merge_method: phlora`, for one weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, cast

from mergekit.merge_methods import ParameterScope
from mergekit.merge_methods.base import ParameterSpec
from pydantic import Field

from peft_posthoc.linalg.spectrum import RankRule
from peft_posthoc.ranks.rules import fixed
from peft_posthoc.ranks.spelling import parse
from peft_posthoc.ranks.words import LIMITS, OF_ONE
from peft_posthoc.text import asked_on

_WHOLE = ("rank", *LIMITS)
# Of the non-base input: mergekit then looks for a value at the model too, then at the slice, the module and the top.
PARAMETERS = tuple(
    ParameterSpec(name, of, ParameterScope.NON_BASE, default)
    for name, of, default in (
        # A float, because a gradient over layers gives one between two numbers.
        ("rank", Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] | None, None),
        ("energy", Annotated[float, Field(gt=0, le=1)] | None, None),
        ("error", Annotated[float, Field(ge=0, lt=1)] | None, None),
        ("max_rank", Annotated[float, Field(ge=1, allow_inf_nan=False)] | None, None),
        ("min_rank", Annotated[float, Field(ge=1, allow_inf_nan=False)] | None, None),
        ("round_to", Annotated[float, Field(ge=1, allow_inf_nan=False)] | None, None),
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
        ValueError: Two of rank, energy and error are given.
    """

    rank: float | Literal["auto"] | None
    """Singular triplets to keep; 0: not carried; auto: what stands out of the noise."""
    energy: float | None
    """Or: keep the fewest that hold this share of the delta's energy."""
    error: float | None
    """Or: keep the fewest with a relative error of at most this."""
    max_rank: float | None
    min_rank: float | None
    round_to: float | None
    rest: Literal["base", "tuned"]
    """Where a weight comes from that is not carried."""
    embeddings: bool
    head: bool
    exact: bool

    def __post_init__(self) -> None:
        given = [f"`{name}`" for name in OF_ONE if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"`parameters` of `merge_method: phlora` give both {' and '.join(given)}. Give one of them."
            )

    @property
    @asked_on("mergekit")
    def rule(self) -> RankRule | None:
        """The rank rule; None if the weight is not to be carried."""
        if self.rank is not None and self.rank != "auto" and not round(self.rank):
            return None
        said = {name: getattr(self, name) for name in (*OF_ONE, *LIMITS)}
        # A gradient over layers gives numbers between two whole ones.
        whole = {name: round(value) for name, value in said.items() if isinstance(value, float) and name in _WHOLE}
        return cast(RankRule, parse(said | whole) or fixed(32))
