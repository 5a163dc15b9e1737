"""What was found of every weight, and how it is laid out in a file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor

from peft_posthoc.extraction.outcomes import Kept, Layer, Skipped
from peft_posthoc.extraction.plan import Plan
from peft_posthoc.linalg.spectrum import Spectrum


class Form(Protocol):
    """How an adapter is laid out in its file."""

    def rank(self, adapter: Findings) -> int:
        """`r` of the file's configuration."""

    def tensors(self, adapter: Findings) -> dict[str, Tensor]:
        """The file's tensors by name."""

    def bytes(self, adapter: Findings) -> dict[str, int]:
        """What the factors of each module take in the file, for all modules that have some in it."""

    def whole(self, adapter: Findings) -> dict[str, int]:
        """By weight, what the tensors take in the file that are there without factors."""

    def keep(self, plan: Plan, names: Collection[str]) -> Plan:
        """The plan with what the form keeps beside factors, of these tensors that it may keep."""

    def warnings(self, adapter: Findings) -> list[str]:
        """What a user of such a file should know."""

    def config(self, adapter: Findings) -> dict[str, Any]:
        """The file's configuration."""

    def padding(self, adapter: Findings) -> int:
        """Bytes of zeros in the file: what it takes beyond every layer at its own rank."""


@dataclass(frozen=True)
class Findings:
    """What was found of every weight."""

    layers: Mapping[str, Layer]
    """By weight name."""
    skipped: Mapping[str, Skipped]
    """By weight name."""
    plan: Plan
    dtype: torch.dtype
    """Of the saved factors."""
    provenance: Mapping[str, Any]
    """Base and tuned with revisions, options, library versions."""
    form: Form
    kept: Mapping[str, Kept] = field(default_factory=dict)
    """By weight name: what is in the file without factors."""
    hollow: bool = False
    """Whether the factors' values were not kept: there is nothing to save."""
    notes: tuple[str, ...] = ()
    """What was decided to compare the two checkpoints: of their names, and the like."""

    @property
    def spectra(self) -> dict[str, Spectrum]:
        """By weight name: what is known of each delta's singular values."""
        return {
            name: Spectrum(
                layer.factors.s,
                layer.factors.norm**2,
                (layer.factors.b.shape[0], layer.factors.a.shape[1]),
                layer.noise,
                layer.base_norm,
            )
            for name, layer in self.layers.items()
        }

    def cut(self, ranks: Mapping[str, int], told: str) -> Self:
        """The leading triplets of each layer.

        Args:
            ranks: By weight name; layers that are not in it keep what they have.
            told: What the report says of the rule that chose them.
        """
        layers = {
            name: layer._replace(factors=layer.factors.cut(max(ranks[name], 1))) if name in ranks else layer
            for name, layer in self.layers.items()
        }
        options = {**self.provenance["options"], "rule": told}
        return replace(self, layers=layers, provenance={**self.provenance, "options": options})

    @property
    def padding(self) -> int:
        """Bytes of zeros in the file, in the portable form: what it takes beyond every layer at its own rank."""
        return self.form.padding(self)

    @property
    def rank(self) -> int:
        """The largest rank that a layer keeps."""
        return max((len(layer.factors.s) for layer in self.layers.values()), default=0)

    @cached_property
    def factors(self) -> dict[str, tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]]:
        """By module: `a` and `b` at their true ranks, in float32, for every module that something is carried in."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in self.layers.items():
            first, *_ = places = self.plan.carried[name]
            a, b = layer.factors.a, layer.factors.b
            for place in places:
                # A tied weight is stored one way in the embedding and the other way in the head.
                turned = place.kind.transposed != first.kind.transposed
                found[place.module] = (b.mT, a.mT) if turned else (a, b)
        return found
