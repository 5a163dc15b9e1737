"""Answers of serving engines to an adapter, and how to start them: told from its configuration and headers."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from peft_posthoc.adapters.foreign import image_file
from peft_posthoc.serving.engines import ENGINES
from peft_posthoc.serving.image_engines import IMAGE_ENGINES
from peft_posthoc.serving.image_subject import ImageSubject
from peft_posthoc.serving.rules import images
from peft_posthoc.serving.rules.rule import Rule, Severity
from peft_posthoc.serving.rules.table import RULES
from peft_posthoc.serving.subject import Subject
from peft_posthoc.text import as_flag, shorten

Verdict = Literal["right", "refused", "silently wrong"]
ALL = {**ENGINES, **IMAGE_ENGINES}
_ORDER = {"refused": 0, "silently wrong": 1, "warning": 2}


@dataclass(frozen=True)
class Finding:
    """A rule that an adapter breaks."""

    rule: str
    severity: Severity
    culprits: tuple[str, ...]
    """The tensors, modules or settings at fault."""
    message: str
    way_out: str
    source: str
    versions: str
    of_base: bool = False
    """Whether it is the base that the engine does not load, with whatever adapter."""

    @classmethod
    def of(cls, rule: Rule, found: tuple[str, ...] | str, engine: str, adapter: str) -> Finding:
        """A rule and what breaks it: parts of the adapter, or all of it, in the words of a refusal."""
        culprits, message = (
            ((adapter,), f"{rule.message}: {found}") if isinstance(found, str) else (found, rule.message)
        )
        versions = rule.versions or ALL[engine].examined
        return cls(rule.name, rule.severity, culprits, message, rule.way_out, rule.source, versions, rule.of_base)


@dataclass(frozen=True)
class EngineOutcome:
    """An engine's answer to an adapter."""

    engine: str
    title: str
    examined: str
    findings: tuple[Finding, ...]
    serve: tuple[str, ...]
    """The commands that serve the adapter."""

    @property
    def verdict(self) -> Verdict:
        """The worst severity found; warnings do not count."""
        found = {finding.severity for finding in self.findings}
        return "refused" if "refused" in found else "silently wrong" if "silently wrong" in found else "right"

    @property
    def loads_base(self) -> bool:
        """Whether the engine loads the base at all."""
        return not any(finding.of_base for finding in self.findings)


@dataclass(frozen=True)
class Check:
    """Answers of all chosen engines to an adapter."""

    adapter: str
    base: str | None
    outcomes: tuple[EngineOutcome, ...]
    every: bool = False
    """Whether all engines were asked, and none by its name."""

    @property
    def wrong(self) -> tuple[str, ...]:
        """The engines that would refuse the adapter, or compute something else.

        Where every engine is asked, those that load no such base are not counted, unless that leaves none.
        """
        counted = [outcome for outcome in self.outcomes if outcome.loads_base or not self.every]
        return tuple(outcome.engine for outcome in counted or self.outcomes if outcome.verdict != "right")

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain JSON values."""
        outcomes = [{**asdict(outcome), "verdict": outcome.verdict} for outcome in self.outcomes]
        return {"format": 1, "adapter": self.adapter, "base": self.base, "engines": outcomes}

    def table(self) -> str:
        """The findings for a terminal: a line for each engine, then each finding once, then the commands."""
        width = max(len(outcome.title) for outcome in self.outcomes)
        lines = [
            f"{outcome.title:<{width}}  {outcome.verdict}{'' if outcome.loads_base else ' (loads no such base)'}"
            for outcome in self.outcomes
        ]
        broken: dict[str, Finding] = {}
        titles: dict[str, list[str]] = defaultdict(list)
        for outcome in self.outcomes:
            for finding in outcome.findings:
                broken.setdefault(finding.rule, finding)
                titles[finding.rule].append(outcome.title)
        for finding in sorted(broken.values(), key=lambda finding: _ORDER[finding.severity]):
            first, *others = finding.culprits
            more = f" and {len(others)} more" if others else ""
            lines += [
                *("", f"{', '.join(titles[finding.rule])}: {finding.severity} [{finding.rule}]"),
                *(f"  found:   {shorten(first, 240)}{more}", f"  why:     {finding.message}"),
                f"  way out: {finding.way_out}",
            ]
        served = [outcome for outcome in self.outcomes if outcome.verdict == "right"]
        if served:
            lines += ["", "To serve it:"]
        for outcome in served:
            lines += [f"  {outcome.title:<{width}}  {command}" for command in outcome.serve]
        if self.base is None:
            lines += [
                "",
                f"Without {as_flag('base')}, names and shapes were not held against the model that is served.",
            ]
        return "\n".join(lines)


def check(
    adapter: str | os.PathLike[str],
    *,
    engines: Iterable[str] = ("all",),
    base: str | os.PathLike[str] | None = None,
) -> Check:
    """Tell what serving engines would do with a PEFT LoRA adapter, without loading it.

    `adapter_config.json` and the headers of the tensors are read, and only such tensors as have to be compared with the
    base's. The rules, their versions and sources are those of `serving.rules.table.RULES`.

    Args:
        adapter: An adapter folder, by whatever tool; or a LoRA file of an image model.
        engines: Some of `ENGINES` and, for adapters of image models, of `IMAGE_ENGINES`; or `all`, of those that are
            for such a file or folder.
        base: The folder of the model that it is to be served on. Its configuration and headers tell whether modules,
            shapes, layers, ties and vocabulary fit.

    Raises:
        AdapterError: The folder holds no LoRA adapter.
        CheckpointError: The base is no model folder.
        ValueError: There is no such engine.
    """
    engines = set(engines)
    names = chosen(engines, of_images=image_file(Path(adapter)) is not None)
    of_text, of_images = ([name for name in names if name in some] for some in (ENGINES, IMAGE_ENGINES))
    found = [judge(Subject.read(adapter, base), of_text)] if of_text else []
    found += [judge(ImageSubject.read(adapter), of_images)] if of_images else []
    outcomes = tuple(outcome for one in found for outcome in one.outcomes)
    return replace(found[0], outcomes=outcomes, every="all" in engines)


def chosen(engines: Iterable[str], *, of_images: bool | None = None) -> tuple[str, ...]:
    """The engines of these names, in the table's order.

    Args:
        engines: Names, or `all` for those of one kind.
        of_images: Whether these are the programs for image models; None where those cannot be asked.

    Raises:
        ValueError: There is no such engine.
    """
    names = set(engines)
    known = {**ENGINES, **({} if of_images is None else IMAGE_ENGINES)}
    unknown = sorted(names - {*known, "all"})
    if unknown or not names:
        what = f"`{unknown[0]}`" if unknown else "none"
        raise ValueError(f"`check(engines=...)` takes some of {', '.join(known)}, or all. Got {what}.")
    everyone = (IMAGE_ENGINES if of_images else ENGINES) if "all" in names else {}
    return tuple(name for name in known if name in names or name in everyone)


def judge(subject: Subject | ImageSubject, engines: Iterable[str]) -> Check:
    """Hold an adapter against every rule of the engines."""
    names = tuple(engines)
    rules = (rule for rule in (*RULES, *images.RULES) if any(map(rule.applies_to, names)))
    found = [(rule, rule.finds(subject)) for rule in rules if subject.base is not None or not rule.needs_base]
    outcomes = []
    for name in names:
        broken = [Finding.of(rule, what, name, subject.label) for rule, what in found if what and rule.applies_to(name)]
        findings = tuple(sorted(broken, key=lambda finding: _ORDER[finding.severity]))
        engine = ALL[name]
        outcomes.append(EngineOutcome(name, engine.title, engine.examined, findings, tuple(engine.serve(subject))))
    base = subject.base.checkpoint.label if subject.base is not None else None
    return Check(subject.label, base, tuple(outcomes))
