"""What refining made: the fitted factors, and how near base + adapter is to the tuned model now and before."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_posthoc.adapters.card import KINDS
from peft_posthoc.adapters.push import CanPush
from peft_posthoc.adapters.writer import Contents, write_folder
from peft_posthoc.refinement.state import clear, is_same
from peft_posthoc.texts.distance import Distance
from peft_posthoc.texts.sequences import Kind


@dataclass(frozen=True)
class Refined(CanPush):
    """A refined adapter: the same modules, ranks, scale and file layout, other values."""

    adapter: str
    """The adapter that it was made from."""
    base: Mapping[Kind, Distance]
    """The base alone against the tuned model, on held-out text of each kind."""
    before: Mapping[Kind, Distance]
    """Base + adapter as it was."""
    after: Mapping[Kind, Distance]
    """Base + adapter as it is now."""
    kept: bool
    """Whether the factors are as they were, because nothing that was tried was better on both kinds of text."""
    interrupted: bool
    steps: int
    lr: float | None
    """Of the last steps: as asked for, the default, or less where that led away. A closed form has none."""
    unmoved: Mapping[str, str]
    """Modules that the method could not fit, and why: their factors are as they were."""
    texts: Mapping[Kind, int]
    """How many the factors were fitted on."""
    seconds: float
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    """All of the file's."""
    config: Mapping[str, Any]
    start: Any
    """The report of the adapter before, None if it had none: its shares are of those factors, not of these."""
    provenance: Mapping[str, Any]
    beside: Mapping[str, Path] = field(default_factory=dict)
    """What was copied beside the adapter before, such as the tokenizer, and goes with it."""
    notes: tuple[str, ...] = ()
    """What else there is to say of the adapter."""
    left: tuple[str, ...] = ()
    """What the run, or one before it, left behind here."""

    def to_dict(self) -> dict[str, Any]:
        """The account as plain JSON values."""
        scores = {
            name: {kind: asdict(distance) for kind, distance in score.items()}
            for name, score in (("base", self.base), ("before", self.before), ("after", self.after))
        }
        plain = ("adapter", "kept", "interrupted", "steps", "lr", "unmoved", "texts", "seconds", "options", "notes")
        return {"format": 1, **{name: getattr(self, name) for name in plain}, **scores}

    def table(self) -> str:
        """The account for a terminal: what came of it, and how far from the tuned model that is."""
        lines = [f"{'held-out text':<18} {'against tuned':<22} {'KL, nats a token':>17} {'same next token':>16}"]
        for kind, said in KINDS.items():
            for name, score in (
                ("base", self.base),
                ("base + adapter before", self.before),
                ("base + adapter now", self.after),
            ):
                if kind in score:
                    lines.append(f"{said:<18} {name:<22} {score[kind].kl:>17.4f} {score[kind].top1:>16.1%}")
        return "\n".join([*self.summary(), "", *lines])

    def summary(self) -> list[str]:
        """What came of it, a line each."""
        made = f"{self.steps} steps on {sum(self.texts.values())} texts in {self.seconds:.0f} s."
        stopped = ["Interrupted: the best so far is kept."] if self.interrupted else []
        if self.unmoved:
            by_reason = Counter(self.unmoved.values())
            stopped += [
                f"{count} {'module keeps its' if count == 1 else 'modules keep their'} factors: {why}."
                for why, count in by_reason.items()
            ]
        stopped += [*self.notes, *self.left]
        if self.kept:
            return [f"Nothing better was found on both kinds of text: the adapter is as it was. {made}", *stopped]
        nearer = ", ".join(
            f"{1 - self.after[kind].kl / self.before[kind].kl:.0%} of the distance on text {said} is gone"
            for kind, said in KINDS.items()
            if kind in self.after and self.before[kind].kl
        )
        return [f"{nearer[:1].upper()}{nearer[1:]}. {made}", *stopped]

    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the adapter folder: all of it, or nothing.

        Args:
            folder: A folder that does not exist yet, or is empty.
            force: Replace an adapter that is there. What else lies in its folder stays.

        Raises:
            AdapterError: The folder holds something, or cannot be written.
        """
        report = {"refined": self.to_dict(), "start": self.start}
        write_folder(folder, Contents(self.tensors, self.config, report, self.provenance, self.beside), force=force)
        # What an interrupted fit goes on from is of no use where what it began with is replaced.
        if not self.interrupted or (not self.kept and is_same(self.adapter, folder)):
            clear(folder)
