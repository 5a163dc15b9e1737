"""What was found of every weight, and how it is laid out in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from peft_posthoc.extraction.forms.lay_out import lay_out
from peft_posthoc.extraction.forms.layout import FileLayout, Form
from peft_posthoc.extraction.outcomes import Kept, Layer, Skipped
from peft_posthoc.extraction.plan import Plan
from peft_posthoc.linalg.spectrum import Spectrum
from peft_posthoc.pairing.difference import Difference

if TYPE_CHECKING:
    from jaxtyping import Float


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
    notes: tuple[str, ...] = ()
    """What was decided to compare the two checkpoints: of their names, and the like."""
    differences: tuple[Difference, ...] = ()
    """Of configuration and tokenizer: what no adapter carries."""
    beside: Mapping[str, Path] = field(default_factory=dict)
    """By name: files of the tuned model that are copied beside the adapter."""
    held: frozenset[str] = frozenset()
    """Weights without a place in an adapter that are in the file of another format all the same."""

    @property
    def spectra(self) -> dict[str, Spectrum]:
        """By weight name: what is known of each delta's singular values."""
        return {
            name: Spectrum(
                layer.factors.s,
                layer.factors.norm**2,
                layer.factors.shape,
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
        return replace(self, layers=layers, provenance=self.ruled_by(told))

    def ruled_by(self, rule: str) -> dict[str, Any]:
        """The provenance, with what another rule is called."""
        return {**self.provenance, "options": {**self.provenance["options"], "rule": rule}}

    @cached_property
    def file(self) -> FileLayout:
        """How it is laid out in its file."""
        return self.file_at({})

    def file_at(self, ranks: Mapping[str, int], form: Form | None = None) -> FileLayout:
        """How it would be laid out at other ranks, or in another form.

        Args:
            ranks: By weight name; the other layers have what they have.
            form: Its own if None.

        Raises:
            AdapterError: The form cannot hold these layers.
        """
        held = {name: len(layer.factors.s) for name, layer in self.layers.items()}
        changed = {name for name, kept in self.kept.items() if kept.delta_norm}
        return lay_out(form or self.form, self.plan, {**held, **ranks}, changed, self.dtype)

    @property
    def padding(self) -> int:
        """Bytes of zeros in the file, in the portable form: what it takes beyond every layer at its own rank."""
        return self.file.padding

    @property
    def rank(self) -> int:
        """The largest rank that a layer keeps."""
        return max((len(layer.factors.s) for layer in self.layers.values()), default=0)

    @cached_property
    def factors(self) -> dict[str, tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]]:
        """By module: `a` and `b` at their true ranks, in float32, for every module that something is carried in.

        Raises:
            AdapterError: They were not kept.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in self.layers.items():
            first, *_ = places = self.plan.carried[name]
            a, b, *_ = layer.lowrank
            for place in places:
                # A tied weight is stored one way in the embedding and the other way in the head.
                turned = place.kind.transposed != first.kind.transposed
                found[place.module] = (b.mT, a.mT) if turned else (a, b)
        return found
