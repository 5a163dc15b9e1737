"""TAT-QA's questions on a paragraph, put two other ways: as preferences, and as a search for the paragraph."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .task import SEED, Question, Sets, needed
from .tatqa import ORIGIN


class _Asked(NamedTuple):
    id: str
    context: int
    question: str
    paragraph: str
    answer: str


class TatQAPreferences:
    """Of a paragraph and a question the right answer, against one that is right for another question beside it."""

    about = f"Preferences made of TAT-QA (Zhu et al., 2021), {ORIGIN}, CC BY 4.0"
    metrics = ("likelier", "margin")
    kind = "preferences"
    home = None

    def load(self, source: Path) -> Sets:
        return Sets(*(list(_pairs(one)) for one in _both(source)))

    def score(self, question: Question, said: str) -> Mapping[str, float]:
        """Of `margin`: log p of the right answer less that of the wrong one, in nats."""
        margin = float(said)
        return {"likelier": 0.5 if margin == 0 else float(margin > 0), "margin": margin}


class TatQARetrieval:
    """A question, and which paragraph answers it: of all that answer a question of the test set."""

    about = f"Retrieval made of TAT-QA (Zhu et al., 2021), {ORIGIN}, CC BY 4.0; texts are cut off at 96 tokens"
    metrics = ("first", "reciprocal rank")
    kind = "retrieval"
    home = None

    def load(self, source: Path) -> Sets:
        return Sets(*([Question(one.id, one.question, one.paragraph, None) for one in part] for part in _both(source)))

    def score(self, question: Question, said: str) -> Mapping[str, float]:
        """Of the place that the right paragraph has, from 1 on."""
        return {"first": float(int(said) == 1), "reciprocal rank": 1 / int(said)}


def _pairs(asked: list[_Asked]) -> Iterator[Question]:
    drawn = random.Random(SEED)
    for one in asked:
        others = sorted({x.answer for x in asked if x.context == one.context and x.answer != one.answer})
        if others:
            wrong = drawn.choice(others)
            yield Question(one.id, f"{one.paragraph}\n{one.question}", one.answer, {"wrong": wrong})


def _both(source: Path) -> tuple[list[_Asked], list[_Asked]]:
    dev, test = (needed(source, f"tatqa_dataset_{name}.json", ORIGIN) for name in ("dev", "test_gold"))
    return list(_read(dev)), list(_read(test))


def _read(file: Path) -> Iterator[_Asked]:
    """Questions that one span of one paragraph answers."""
    for place, context in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        paragraphs: dict[str, Any] = {str(one["order"]): one["text"] for one in context["paragraphs"]}
        for one in context["questions"]:
            if (one["answer_from"], one["answer_type"]) != ("text", "span"):
                continue
            if len(one["rel_paragraphs"]) == len(one["answer"]) == 1:
                paragraph = paragraphs[one["rel_paragraphs"][0]]
                yield _Asked(one["uid"], place, one["question"], paragraph, one["answer"][0])
