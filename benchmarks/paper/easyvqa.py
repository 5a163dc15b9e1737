"""Easy-VQA (Zhou, 2019): questions on a coloured shape, in images of 64 by 64 that arrive with a package.

The base is trained on what shape and what colour there is, the fine-tune on what is true of the image, yes or no.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from .task import Question, Sets, needed

ORIGIN = "the package `easy-vqa`: `pip install easy-vqa`, and the folder is `easy_vqa/data` of it"
_BINARY = {"yes", "no"}


class EasyVQA:
    """Yes or no."""

    about = "Easy-VQA (Zhou, 2019), https://github.com/vzhou842/easy-VQA, MIT; yes and no"
    metrics = ("accuracy",)
    kind = "images"

    def load(self, source: Path) -> Sets:
        return Sets(*([one for one in read(source, part) if one.answer in _BINARY] for part in ("train", "test")))

    def score(self, question: Question, said: str) -> Mapping[str, float]:
        return {"accuracy": float(said == question.answer)}


def others(source: Path) -> list[Question]:
    """The training questions that are not the task's."""
    return [one for one in read(source, "train") if one.answer not in _BINARY]


def read(source: Path, part: str) -> Iterator[Question]:
    """The questions of one part, each with its image's file."""
    source = _folder(source)
    for place, (asked, answer, image) in enumerate(
        json.loads(needed(source, f"{part}/questions.json", ORIGIN).read_text())
    ):
        yield Question(f"{part}-{place}", asked, answer, None, source / part / "images" / f"{image}.png")


def _folder(source: Path) -> Path:
    package = importlib.util.find_spec("easy_vqa")
    if not (source / "train").is_dir() and package is not None and package.origin is not None:
        return Path(package.origin).parent / "data"
    return source
