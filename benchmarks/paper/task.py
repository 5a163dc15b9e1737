"""What a model is asked and how its answers are judged: one file for each set of the paper."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

SEED = 42  # the paper's (appendix C)
PLAIN = {"CIDEr", "margin"}
"""Metrics that are no share: CIDEr is from 0 to 10, a margin in nats."""
T = TypeVar("T")


class Question(NamedTuple):
    """A prompt without a word on the format of the answer, and the answer that is trained on."""

    id: str
    prompt: str
    answer: str
    gold: Any
    """What `score` needs of the right answer."""
    image: Any = None
    """A PIL image, or a path of a video's."""


class Sets(NamedTuple):
    """Questions to train on and to be judged by; no context is in both."""

    train: Sequence[Question]
    test: Sequence[Question]


class Task(Protocol):
    """A data set with its metrics.

    `about` names source and licence, `metrics` has the names that `score` gives, `kind` is the one of the model,
    `home` the set's name on the hub, where its files there are the ones that `load` reads.
    """

    about: str
    metrics: tuple[str, ...]
    kind: str
    home: str | None

    def load(self, source: Path) -> Sets:
        """All questions of a local folder, as the data set's own files have them.

        Raises:
            FileNotFoundError: A file is not there; the line says which, and where it can be had.
        """

    def score(self, question: Question, said: str) -> Mapping[str, float]:
        """Each metric of one answer, from 0 to 1 but for those in `PLAIN`.

        Args:
            question: What was asked.
            said: What the model said, or what its kind says of it.
        """


def needed(source: Path, name: str, origin: str) -> Path:
    """A file of a data set.

    Raises:
        FileNotFoundError: It is not there.
    """
    if not (source / name).is_file():
        raise FileNotFoundError(f"There is no `{name}` in `{source}`: it comes from {origin}.")
    return source / name


def fetched(home: str | None) -> Path:
    """The folder with a data set of the hub; this one, for a set that has no home there.

    Raises:
        FileNotFoundError: The hub cannot be reached, and the set is not there from an earlier time.
    """
    if home is None:
        return Path()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(home, repo_type="dataset"))
    except OSError as error:
        raise FileNotFoundError(f"`{home}` was not fetched from the hub: give its folder with `--data`.") from error


def sample(questions: Sequence[T], count: int | None) -> list[T]:
    """So many of them, drawn without replacement, in their order: the same ones each time."""
    if count is None or count >= len(questions):
        return list(questions)
    chosen = sorted(random.Random(SEED).sample(range(len(questions)), count))
    return [questions[i] for i in chosen]
