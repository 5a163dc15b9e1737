"""Answers of every rank rule to the same deltas: ranks, what they hold, and what they take in a file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft_posthoc.errors import AdapterError
from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.forms.layout import FileLayout, Form
from peft_posthoc.extraction.sizing import PlanSizing
from peft_posthoc.linalg.spectrum import RankRule
from peft_posthoc.ranks.budget import budget
from peft_posthoc.ranks.rules import Allocation, above_noise, fixed, keep_energy, keep_error
from peft_posthoc.ranks.spelling import flags as flags_of
from peft_posthoc.text import as_flag

RANKS = (8, 16, 32, 64, 128)
ENERGIES = (0.5, 0.9, 0.95, 0.99)
ERRORS = (0.5, 0.2)
BUDGETS = ("1%", "2%", "5%", "10%")


@dataclass(frozen=True)
class Candidate:
    """One rule's answer."""

    flags: str
    """The flags that ask `phlora extract` for it."""
    ranks: Mapping[str, int]
    """By weight name. None are there where the rule has no answer."""
    beyond: frozenset[str]
    """Weights of which the rule asks for more than was factored: their rank here is what was."""
    energy: float
    """E_r over all layers together, weighted by energy. At least this much where some ranks are higher."""
    portable: int | None
    """Bytes in the portable form, where all layers are padded to one rank; None where these layers have none."""
    padding: int | None
    """Of these, zeros."""
    peft: int | None
    """Bytes in the `peft` form, every layer at its own rank."""
    reason: str = ""
    """Why there is no answer."""
    rule: RankRule | Allocation | None = None
    """None of an adapter that was written."""

    @property
    def share(self) -> float | None:
        """The share of every layer's energy that the rule keeps; None of other rules."""
        return self.rule.share if isinstance(self.rule, keep_energy) else None

    @property
    def measures(self) -> bool:
        """True for `auto`: what stands out of the noise."""
        return isinstance(self.rule, above_noise)

    @property
    def heading(self) -> str:
        """The rule over a column."""
        return "auto" if self.measures else self.flags if self.share is None else f"for {self.share}"

    @property
    def error(self) -> float:
        """`||delta - b @ a|| / ||delta||` over all layers together."""
        return math.sqrt(max(1 - self.energy, 0.0))

    @property
    def spread(self) -> tuple[int, float, int]:
        """The lowest, the median and the highest rank."""
        ranks = self.ranks.values()
        return min(ranks), statistics.median(ranks), max(ranks)

    def rank(self, weight: str) -> str:
        """A layer's rank for people: `>512` where it is higher than what was factored."""
        if not self.ranks:
            return "-"
        return f"{'>' if weight in self.beyond else ''}{self.ranks[weight]}"

    def at_least(self, text: str) -> str:
        """A number that grows with the ranks, for people: `>` where some are higher than what was factored."""
        return f">{text}" if self.beyond and text != "-" else text

    def at_most(self, text: str) -> str:
        """A number that falls with the ranks, for people: `<` where some are higher than what was factored."""
        return f"<{text}" if self.beyond else text

    def lowest_to_highest(self, weights: Collection[str] = ()) -> str:
        """The lowest and the highest rank, of these weights or of all, for people."""
        if not self.ranks:
            return self.reason
        ranks = {name: self.ranks[name] for name in weights or self.ranks}
        low, high = min(ranks.values()), max(ranks.values())
        beyond = self.beyond & ranks.keys()
        if len(beyond) == len(ranks):
            return f">{high}"
        lowest, highest = str(low), f"{'>' if any(ranks[name] == high for name in beyond) else ''}{high}"
        return highest if low == high else f"{lowest} to {highest}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "flags": self.flags,
            "ranks": dict(self.ranks),
            "beyond": sorted(self.beyond),
            "energy": self.energy if self.ranks else None,
            "relative_error": self.error if self.ranks else None,
            "bytes": {"portable": self.portable, "peft": self.peft},
            "padding": self.padding,
            "reason": self.reason,
        }


def candidates(adapter: Adapter) -> list[Candidate]:
    """The answers of all rules to the spectra of one adapter.

    Ranks above the adapter's are left out; so is `--rank auto` where the noise was not measured.
    """
    return [*_by_layer(adapter), *_by_budget(adapter)]


def of(
    flags: str, adapter: Adapter, beyond: Iterable[str] = (), rule: RankRule | Allocation | None = None
) -> Candidate:
    """The answer that an adapter is."""
    held = sum(layer.factors.energy * layer.factors.norm**2 for layer in adapter.layers.values())
    total = sum(layer.factors.norm**2 for layer in adapter.layers.values())
    portable, peft = _in("portable", adapter), _in("peft", adapter)
    return Candidate(
        flags=flags,
        ranks={name: len(layer.factors.s) for name, layer in adapter.layers.items()},
        beyond=frozenset(beyond),
        energy=min(held / total, 1.0),
        portable=None if portable is None else portable.bytes,
        padding=None if portable is None else portable.padding,
        peft=None if peft is None else peft.bytes,
        rule=rule,
    )


def _in(form: Form, adapter: Adapter) -> FileLayout | None:
    """The file in a form; None if the form cannot hold these layers."""
    try:
        return adapter.file_at({}, form)
    except AdapterError:
        return None


def _by_layer(adapter: Adapter) -> Iterator[Candidate]:
    rules: list[fixed | keep_energy | keep_error] = [fixed(rank) for rank in RANKS if rank <= adapter.rank]
    rules += [*map(keep_energy, ENERGIES), *map(keep_error, ERRORS)]
    spectra = adapter.spectra
    for rule in rules:
        yield _cut(adapter, rule, {name: rule(spectrum) for name, spectrum in spectra.items()})
    signal = {name: layer.signal for name, layer in adapter.layers.items()}
    if None not in signal.values():
        yield _cut(adapter, above_noise(), {name: max(rank or 0, 1) for name, rank in signal.items()})


def _cut(adapter: Adapter, rule: fixed | keep_energy | keep_error | above_noise, asked: Mapping[str, int]) -> Candidate:
    flags = " ".join(flags_of(rule))
    held = {name: len(layer.factors.s) for name, layer in adapter.layers.items()}
    ranks = {name: min(rank, held[name]) for name, rank in asked.items()}
    beyond = [name for name, rank in asked.items() if rank > held[name]]
    return of(flags, adapter.cut(ranks, flags), beyond, rule)


def _by_budget(adapter: Adapter) -> Iterator[Candidate]:
    spectra = adapter.spectra
    for size in BUDGETS:
        flags, rule = as_flag("size", size), budget(size)
        try:
            bounds = rule.bounds(PlanSizing(adapter.plan, adapter.dtype, adapter.form))
            # No deeper than `extract` would factor: it would choose among as many.
            deep = {name: bounds[name](spectrum) for name, spectrum in spectra.items()}
            ranks = {name: min(deep[name], len(spectrum.s)) for name, spectrum in spectra.items()}
            found = adapter.cut(ranks, flags).at(rule)
        except ValueError:
            yield Candidate(flags, {}, frozenset(), 0.0, None, None, None, "less than the smallest adapter", rule)
            continue
        beyond = [name for name in ranks if deep[name] > ranks[name] == len(found.layers[name].factors.s)]
        yield of(flags, found, beyond, rule)
