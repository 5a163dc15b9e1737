"""Rules about the base that an adapter is served on, where it is another than the adapter was made for."""

from __future__ import annotations

from pathlib import Path

from peft_posthoc.adapters.named_base import another_base, base_of
from peft_posthoc.serving.engines import ENGINES
from peft_posthoc.serving.rules.rule import WARNING, WRONG, Rule
from peft_posthoc.serving.subject import Subject


def another(subject: Subject) -> str:
    """The words for a base that has other tensors than the one which the adapter names."""
    return _doubt(subject) if Path(_named(subject)).is_dir() else ""


def maybe_another(subject: Subject) -> str:
    """The words for a base that is called otherwise than the one which the adapter names, and which is not here."""
    return "" if Path(_named(subject)).is_dir() else _doubt(subject)


def _named(subject: Subject) -> str:
    named = base_of(subject.config)
    return "" if named is None else named.name


def _doubt(subject: Subject) -> str:
    return (another_base(subject.config, subject.base.checkpoint.label) if subject.base is not None else None) or ""


RULES: tuple[Rule, ...] = (
    Rule(
        name="another-base",
        engines=tuple(ENGINES),
        severity=WRONG,
        finds=another,
        message="adds to whatever weights it is given what belongs to others",
        way_out="serve it on the base that it was made for",
        source="read: of no engine is it known that it compares the two",
        needs_base=True,
    ),
    Rule(
        name="maybe-another-base",
        engines=tuple(ENGINES),
        severity=WARNING,
        finds=maybe_another,
        message="adds to whatever weights it is given, and the base that the adapter names is not here to be compared",
        way_out="see that it is the base that the adapter was made for",
        source="read: of no engine is it known that it compares the two",
        needs_base=True,
    ),
)
