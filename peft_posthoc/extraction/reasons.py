"""Why a weight is not carried, and which option would change that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from peft_posthoc.text import as_flag, asked


class Reason(StrEnum):
    """Why a weight is not carried: a code, which reports give beside the text."""

    ONLY_IN_BASE = "only-in-base", "only in base"
    ONLY_IN_TUNED = "only-in-tuned", "only in tuned"
    UNREAD = "unread", "only in tuned, and not read when a model of its class is loaded"
    OTHER_SHAPE = "other-shape", "shapes differ ({exclude})", {"exclude": None}
    BESIDE_MODEL = "beside-model", "a module beside the model, in a folder of its own ({0})"
    QUANTIZED = "quantized", "quantised ({0}): its numbers need their scales"
    OF_QUANTIZED = "of-quantized", "codes or scales of a quantised weight ({0})"
    NOT_FLOATING = "not-floating", "not a floating-point tensor"
    EMPTY = "empty", "holds no values"
    BIAS = "bias", "bias (LoRA has no portable form for it)"
    VECTOR = "vector", "norm or other vector (LoRA has no form for it)"
    NO_FORM = "no-form", "no LoRA form for this tensor ({0})"
    BIAS_OF_EXPERTS = "bias-of-experts", "bias of experts (carried with {form})", {"form": "peft"}
    EXPERT = "expert", "expert (carried with {experts})", {"experts": None}
    BESIDE_EXPERTS = (
        "beside-experts",
        "layer beside experts (PEFT drops its factors; carried with {experts} or {form})",
        {"experts": "per-expert", "form": "peft"},
    )
    NOT_ASKED_FOR = "not-asked-for", "{0} (carried with {ways})"
    NOT_CHOSEN = "not-chosen", "not chosen ({include}/{exclude})", {"include": None, "exclude": None}
    NO_RANK = "no-rank", "no rank is given for it"
    OTHER_ROWS = "other-rows", "other rows than the base's ({vocab})", {"vocab": "extend"}
    OF_THE_MODEL = "of-the-model", "a parameter of the model itself ({0})"
    BESIDE_FACTORS = "beside-factors", "a parameter of a module that holds layers with factors ({0})"
    MISREAD = "misread", "PEFT would take the name of its module, `{0}`, to mean `{1}` too"
    DROPPED = "dropped", "PEFT drops its factors when it loads them (carried with {form})", {"form": "peft"}
    NOT_LOADED = "not-loaded", "PEFT does not load its module, `{0}`, or not without what is missing of it"
    TOLD = "told", "{0}"
    """The caller's own, in its words."""

    text: str
    ways: Mapping[str, Any]

    def __new__(cls, code: str, text: str, ways: Mapping[str, Any] | None = None) -> Reason:
        """Make a member: its code, its text with places for what it is about, and the options that it speaks of."""
        member = str.__new__(cls, code)
        member._value_ = code
        member.text, member.ways = text, ways or {}
        return member


CODED = (Reason.QUANTIZED, Reason.OF_QUANTIZED)
"""The reasons of what is stored as codes, which are never taken for numbers."""


@dataclass(frozen=True)
class LeftOut:
    """The fate of a weight that the adapter does not carry."""

    reason: Reason
    about: tuple[str, ...] = ()
    """What the reason's text has places for."""
    own_ways: Mapping[str, Any] = field(default_factory=dict)
    """Options that would carry it, by name, where the reason alone does not tell: each does."""

    @property
    def way_out(self) -> dict[str, Any]:
        """Options that decide it, by name; None where their value is the user's to find."""
        return {**self.reason.ways, **self.own_ways}

    @property
    def text(self) -> str:
        """In words that are the same wherever an adapter is made: options are the command line's."""
        return self._worded(as_flag)

    @property
    def hint(self) -> str:
        """In words for whoever asked now."""
        return self._worded(asked)

    def _worded(self, word: Callable[[str, Any], str]) -> str:
        ways = {option: word(option, value) for option, value in self.way_out.items()}
        return self.reason.text.format(*self.about, ways=" or ".join(ways.values()), **ways)


def told(reason: str) -> LeftOut:
    """A weight that the caller leaves out, for a reason in its own words."""
    return LeftOut(Reason.TOLD, (reason,))
