"""What a refinement is asked for beside its adapter and its models, before there are any; for another process too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.extraction.preflight import Preflight, planned, timed
from peft_posthoc.extraction.prepare import prepare
from peft_posthoc.extraction.processes import ALONE, Processes
from peft_posthoc.extraction.request import Request
from peft_posthoc.refinement.blocks import blocks
from peft_posthoc.refinement.compensated import compensated
from peft_posthoc.refinement.distil import distil
from peft_posthoc.refinement.method import Method
from peft_posthoc.refinement.opened import Refinable
from peft_posthoc.refinement.preflight import RefinePreflight, refine_preflight
from peft_posthoc.refinement.refine import check_numbers, refine
from peft_posthoc.refinement.refined import Refined
from peft_posthoc.refinement.sharded import check_processes
from peft_posthoc.refinement.usual import Usual
from peft_posthoc.running.live import check_sides
from peft_posthoc.sources import Source, open_pair
from peft_posthoc.texts.texts import Given, Prompts, Sampled, Texts

# What another process knows by its name.
_KINDS: dict[str, type] = {
    kind.__name__: kind for kind in (Sampled, Prompts, Given, Usual, distil, compensated, blocks)
}


@dataclass(frozen=True)
class Preflights:
    """What an extraction and the fit after it will do and need: one after the other."""

    extraction: Preflight
    refine: RefinePreflight

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: those of the extraction, and the fit's under `refine`."""
        return self.extraction.to_dict() | {"refine": self.refine.to_dict()}

    def table(self) -> str:
        """For a terminal."""
        return f"{self.extraction.table()}\n\nAnd then, to refine it:\n{self.refine.table()}"


@dataclass(frozen=True)
class Refining:
    """The arguments of `refine` that say how."""

    texts: Texts | None = None
    method: Method | Usual | None = None
    sequences: int = 960
    length: int | None = None
    minutes: float | None = None
    seed: int = 0

    @classmethod
    def of(cls, asked: bool | Mapping[str, Any] | Refining) -> Refining | None:
        """What is asked for; None if nothing is.

        Args:
            asked: True for `refine` as it is, or arguments of it by name.

        Raises:
            TypeError: There is no such argument.
            ValueError: One has no such value.
        """
        if isinstance(asked, Refining) or asked is False:
            return asked or None
        given = {} if asked is True else dict(asked)
        if unknown := sorted(given.keys() - (names := [field.name for field in fields(cls)])):
            raise TypeError(f"Refining takes no `{unknown[0]}`. It takes {', '.join(names)}.")
        made = cls(**given)
        check_numbers(made.sequences, made.length, made.minutes, made.seed)
        return made

    def __call__(
        self,
        adapter: Refinable,
        base: Source,
        tuned: Source,
        *,
        base_revision: str | None = None,
        tuned_revision: str | None = None,
        device: str = "cpu",
        out: str | os.PathLike[str] | None = None,
        since: float | None = None,
        processes: Processes = ALONE,
        progress: bool = False,
    ) -> Refined:
        """Refine an adapter, as `refine` does."""
        return refine(
            adapter,
            base,
            tuned,
            base_revision=base_revision,
            tuned_revision=tuned_revision,
            device=device,
            out=out,
            since=since,
            processes=processes,
            progress=progress,
            **vars(self),
        )

    def check(
        self,
        base: Source,
        tuned: Source,
        *,
        base_revision: str | None = None,
        tuned_revision: str | None = None,
        processes: int = 1,
    ) -> None:
        """See before an extraction, from configurations alone, whether there will be models to fit to.

        Raises:
            PosthocError: Models are to be split, and there is one process.
            CheckpointError: A model cannot be read, or is none that says next tokens.
            MismatchError: They are of two classes.
        """
        if getattr(self.method, "shard", False):
            check_processes(processes)
        check_sides(*open_pair(base, tuned, base_revision=base_revision, tuned_revision=tuned_revision))

    def preflight(
        self,
        adapter: str | os.PathLike[str] | AdapterFile,
        base: Source,
        tuned: Source,
        **where: Any,
    ) -> RefinePreflight:
        """See what a fit will do and need, as `refine_preflight` does."""
        return refine_preflight(
            adapter,
            base,
            tuned,
            texts=self.texts,
            method=self.method,
            sequences=self.sequences,
            length=self.length,
            **where,
        )

    def preflights(
        self, base: Source, tuned: Source, rank: Any, *, out: str | os.PathLike[str], processes: int = 1, **options: Any
    ) -> Preflights:
        """See what an extraction and the fit after it will do and need; `options` are the extraction's."""
        prepared = prepare(base, tuned, Request.of(rank, **options))
        where = {name: options[name] for name in ("base_revision", "tuned_revision", "device") if name in options}
        fit = self.preflight(planned(prepared, out), base, tuned, out=out, processes=processes, **where)
        return Preflights(timed(prepared, out), fit)

    def to_json(self) -> dict[str, Any]:
        """It as plain JSON values.

        Raises:
            ValueError: A text or a method is of somebody's own class.
        """
        return {name: _told(name, value) for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Refining:
        """What `to_json` told."""
        return cls(**{name: _made(value) for name, value in told.items()})


def _told(name: str, value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    kind = type(value).__name__
    if _KINDS.get(kind) is not type(value):
        raise ValueError(f"`{name}` of class `{kind}` cannot be handed to another process.")
    return {"kind": kind, **vars(value)}


def _made(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return _KINDS[value["kind"]](**{name: own for name, own in value.items() if name != "kind"})
