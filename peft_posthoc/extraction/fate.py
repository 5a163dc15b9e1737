"""What becomes of one weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from peft_posthoc.extraction.reasons import LeftOut
from peft_posthoc.linalg.spectrum import RankRule
from peft_posthoc.models.kinds import LayerKind
from peft_posthoc.models.layout import Place


@dataclass(frozen=True)
class Factored:
    """The fate of a weight that is carried as factors."""

    places: tuple[Place, ...]
    """The modules that get them."""
    rule: RankRule | None = None
    """How many singular triplets to keep; None until it is decided."""

    @property
    def kind(self) -> LayerKind:
        """How the weight becomes a matrix."""
        return self.places[0].kind


class Whole(NamedTuple):
    """The fate of a tensor that is in the file without factors."""

    modules: tuple[str, ...]
    """Those that are kept whole for it, or the one with factors whose bias it is."""
    names: tuple[str, ...]
    """In the model, that it has in these modules."""
    as_bias: bool
    """As the bias of a module with factors: its difference; otherwise the tuned tensor itself."""


Fate: TypeAlias = Factored | Whole | LeftOut
