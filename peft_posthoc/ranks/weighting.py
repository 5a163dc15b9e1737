"""What a unit of a layer's energy is worth beside that of other layers, where ranks are shared out.

Nothing is known of the data, so these are guesses at how much a layer matters. docs/ranks.md has what they are worth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from peft_posthoc.linalg.spectrum import Spectrum


class Weighting(Protocol):
    """What energy is worth: a small object, so that it prints, compares and travels between processes."""

    def __call__(self, spectra: Mapping[str, Spectrum]) -> Mapping[str, float]:
        """What a unit of energy is worth in each layer; only ratios matter.

        Args:
            spectra: By weight name: what is known of each delta.
        """


@dataclass(frozen=True)
class energy:
    """The same everywhere: the most total energy within the size."""

    def __call__(self, spectra: Mapping[str, Spectrum]) -> dict[str, float]:
        """One."""
        return dict.fromkeys(spectra, 1.0)


@dataclass(frozen=True)
class relative:
    """Energy counts as a share of its own delta's."""

    def __call__(self, spectra: Mapping[str, Spectrum]) -> dict[str, float]:
        """One over each delta's energy."""
        return {name: 1 / one.energy if one.energy else 0.0 for name, one in spectra.items()}


@dataclass(frozen=True)
class balanced:
    """Energy counts as a share of its own delta's, and a triplet costs the root of `m + n`.

    Large layers are often the embeddings and the head, whose deltas decay slowly.
    """

    def __call__(self, spectra: Mapping[str, Spectrum]) -> dict[str, float]:
        """The relative worth, times the root of `m + n`."""
        shares = relative()(spectra)
        return {name: shares[name] * math.sqrt(sum(one.shape)) for name, one in spectra.items()}


@dataclass(frozen=True)
class early:
    """The same, and more so in early layers: what one of these gets wrong goes through all that follow."""

    ratio: float = 4.0
    """How much more energy is worth in the first layer than in the last."""

    def __call__(self, spectra: Mapping[str, Spectrum]) -> dict[str, float]:
        """What `balanced` gives, over a number that grows from 1 to `ratio` with depth."""
        worth, depths = balanced()(spectra), depth(spectra)
        return {name: worth[name] / (1 + (self.ratio - 1) * depths[name]) for name in spectra}


def depth(names: Mapping[str, object]) -> dict[str, float]:
    """How deep each layer lies, from 0 for the first to 1 for the last, by the numbers in the names.

    The first number of a name counts, among those with the same beginning. Heads and the like are last; what else has
    no number, such as embeddings, is first.
    """
    found = {name: re.match(r"(.*?)(?<![^.])(\d{1,18})(?![^.])", name) for name in names}
    last: dict[str, int] = {}
    for match in found.values():
        if match is not None:
            last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    return {
        name: float(_LAST.search(name) is not None) if match is None else int(match[2]) / max(last[match[1]], 1)
        for name, match in found.items()
    }


_LAST = re.compile(r"(^|\.)(lm_head|head|classifier|score|embed_out|output_projection|qa_outputs)(\.|$)")

WEIGHTINGS: Mapping[str, Weighting | None] = {
    "uniform": None,
    "energy": energy(),
    "relative": relative(),
    "balanced": balanced(),
    "early": early(),
}
"""By the name that the command line has for it. `uniform` is none: all layers have the same rank."""
