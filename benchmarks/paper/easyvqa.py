"""Easy-VQA (Zhou, 2019): questions on a coloured shape, in images of 64 by 64 that arrive with a package.

The base is trained on shapes, the fine-tune on colours. Those with yes and no are left alone: 82.5 % of those in
the test set are right by the question alone, the image unseen.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from .task import Question, Sets, needed

ORIGIN = "the package `easy-vqa`: `pip install easy-vqa`, and the folder is `easy_vqa/data` of it"
_SHAPES = {"circle", "rectangle", "triangle"}
_COLOURS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


class EasyVQA:
    """Which colour an image shows."""

    about = "Easy-VQA (Zhou, 2019), https://github.com/vzhou842/easy-VQA, MIT, its questions for a colour"
    metrics = ("accuracy",)
    kind = "images"
    home = None

    def load(self, source: Path) -> Sets:
        return Sets(*([one for one in read(source, part) if one.answer in _COLOURS] for part in ("train", "test")))

    def score(self, question: Question, said: str) -> Mapping[str, float]:
        return {"accuracy": float(said == question.answer)}


def shapes(source: Path) -> list[Question]:
    """What the base is trained on."""
    return [one for one in read(source, "train") if one.answer in _SHAPES]


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
