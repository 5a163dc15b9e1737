"""How a model of one kind is loaded, trained and judged: one file for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import Trainer

from .settings import Settings
from .task import Question


class Kind(Protocol):
    """What differs between a model that answers, one that prefers, one that finds and one that sees.

    `arguments` are transformers' `TrainingArguments` by name. `refines` says whether `refine` takes such models,
    `resumes` whether the Trainer finds the weights of a checkpoint again.
    """

    refines: bool
    resumes: bool

    def load(self, folder: Path | str) -> Any: ...

    def processor(self, base: str) -> Any: ...

    def length(self, question: Question, processor: Any) -> int: ...

    def trainer(
        self, model: Any, arguments: dict[str, Any], questions: Sequence[Question], processor: Any
    ) -> Trainer: ...

    def said(self, model: Any, processor: Any, questions: Sequence[Question], settings: Settings) -> Mapping[str, str]:
        """What the task scores, by the question's id."""


def kind_of(name: str) -> Kind:
    """The kind that a task asks for.

    Raises:
        NotImplementedError: There is none yet.
    """
    if name == "clips":
        raise NotImplementedError("No model that reads clips is run here yet: the set has its loader and its metrics.")
    if name == "preferences":
        from .preferring import Preferences

        return Preferences()
    if name == "retrieval":
        from .retrieving import Retrieval

        return Retrieval()
    if name == "images":
        from .seeing import Images

        return Images()
    from .answering import Answers

    return Answers()
