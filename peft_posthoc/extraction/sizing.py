"""What ranks cost in an adapter's file, for rules that share them out (`ranks.sizing`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from peft_posthoc.adapters.writer import header_bytes
from peft_posthoc.extraction.findings import Findings, Form
from peft_posthoc.extraction.forms.portable import PORTABLE, stacks_of
from peft_posthoc.extraction.plan import Plan, tuned_bytes
from peft_posthoc.linalg.spectrum import Spectrum


@dataclass(frozen=True)
class PlanSizing:
    """Of a plan: every weight in it may change."""

    plan: Plan
    dtype: torch.dtype
    """Of the saved factors."""
    form: Form

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """By weight, the two sides of its delta."""
        slots = {name: self.plan.slots[places[0].module] for name, places in self.plan.carried.items()}
        return {name: (slot.m, slot.n) for name, slot in slots.items()}

    @cached_property
    def numbers(self) -> dict[str, int]:
        """By weight, how many numbers of the file one triplet is."""
        return {name: sum(self.shapes[name]) * len(places) for name, places in self.plan.carried.items()}

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def padded(self) -> bool:
        """Whether it is the portable form, of one rank."""
        return self.form is PORTABLE

    @property
    def tuned_bytes(self) -> int:
        """Of the tuned checkpoint."""
        return tuned_bytes(self.plan)


@dataclass(frozen=True)
class FoundSizing:
    """Of what was found: the deltas, as far as they are factored."""

    found: Findings
    rule: str
    """What the file will say of the rule."""

    @cached_property
    def spectra(self) -> dict[str, Spectrum]:
        """By weight."""
        return self.found.spectra

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """By weight, the two sides of its delta."""
        return {name: spectrum.shape for name, spectrum in self.spectra.items()}

    @cached_property
    def numbers(self) -> dict[str, int]:
        """By weight, how many numbers of the file one triplet is."""
        return {name: sum(shape) * len(self.found.plan.carried[name]) for name, shape in self.shapes.items()}

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return self.found.dtype.itemsize

    @property
    def padded(self) -> bool:
        """Whether it is the portable form, of one rank."""
        return self.found.form is PORTABLE

    @property
    def shared(self) -> bool:
        """Whether stacked experts share a rank in the file."""
        return bool(stacks_of(self.found))

    @property
    def tuned_bytes(self) -> int:
        """Of the tuned checkpoint."""
        return tuned_bytes(self.found.plan)

    def size(self, ranks: Mapping[str, int], *, params: bool) -> int:
        """Bytes of the tensors in the file, or how many numbers they hold."""
        cut = self.found.cut(ranks, self.rule)
        inside, whole = cut.form.bytes(cut), cut.form.whole(cut)
        if not params:
            return sum(inside.values()) + sum(whole.values())
        kept = sum(count // cut.kept[name].value.itemsize for name, count in whole.items())
        return sum(inside.values()) // self.item + kept

    def header(self, ranks: Mapping[str, int], digits: int) -> int:
        """Bytes of the file's header, where every tensor's entry has so many digits more."""
        cut = self.found.cut(ranks, self.rule)
        tensors = cut.form.tensors(cut)
        return header_bytes(tensors, cut.provenance) + digits * len(tensors)
