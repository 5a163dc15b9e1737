"""TAT-QA (Zhu et al., 2021): questions on tables and paragraphs of financial reports.

Exact match and F1 follow the rules of the data set's own scorer (`tatqa_metric.py` of NExTplusplus/TAT-QA): an answer
and its scale are one text; a number counts as its value, rounded to two decimals, times its scale; a bare fraction is
right for a percentage; of several answers all must be there, in any order. `literal` is the same text to the letter.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .numbers import SCALES, number, split_scale
from .task import Question, Sets, needed

_ARTICLES = {"a", "an", "the"}
ORIGIN = "https://github.com/NExTplusplus/TAT-QA (dataset_raw)"
# Where there is no train file the dev file is trained on, which is never scored.
_TRAIN = ("tatqa_dataset_train.json", "tatqa_dataset_dev.json")
_TEST = "tatqa_dataset_test_gold.json"
_BETWEEN = "; "


class TatQA:
    """Of each context the table as rows, the paragraphs, and a question."""

    about = f"TAT-QA (Zhu et al., 2021), {ORIGIN}, CC BY 4.0"
    metrics = ("exact match", "F1", "literal")
    kind = "answers"
    home = None

    def load(self, source: Path) -> Sets:
        train = next((source / name for name in _TRAIN if (source / name).is_file()), None)
        return Sets(list(_read(train or needed(source, _TRAIN[1], ORIGIN))), list(_read(needed(source, _TEST, ORIGIN))))

    def score(self, question: Question, said: str) -> Mapping[str, float]:
        gold = question.gold
        right = as_text([str(one) for one in gold["answer"]], gold["scale"])
        pairs = [(_tokens(one), _tokens(right)) for one in _readings(said)]
        exact = float(any(sorted(one) == sorted(other) for one, other in pairs))
        shares = [_f1(set(one), set(other)) for one, other in pairs]
        counted = exact if gold["answer_type"] in ("arithmetic", "count") else round(max(shares, default=0.0), 2)
        return {"exact match": exact, "F1": counted, "literal": float(said.strip() == question.answer)}


def as_text(answers: Sequence[str], scale: str) -> str:
    """Answers and their scale as one text, numbers as their values to four decimals."""
    return " ".join(_value(answer, scale) for answer in sorted(answers))


def _value(answer: str, scale: str) -> str:
    value = number(answer)
    if value is None:
        return f"{answer} {scale}".strip()
    return f"{value:.4f}" if "%" in answer else f"{round(value, 2) * SCALES[scale]:.4f}"


def _readings(said: str) -> Iterator[str]:
    """What an answer may mean: the scorer is given its parts, and here they have to be found in one text.

    Its last word may be the scale of all its parts or belong to the last one; semicolons may be within a part. A bare
    number may be the fraction that a percentage is.
    """
    text, scale = split_scale(said)
    for parts, of_all in ((text.split(_BETWEEN.strip()), scale), (said.split(_BETWEEN.strip()), ""), ([said], "")):
        if answers := [one.strip() for one in parts if one.strip()]:
            yield as_text(answers, of_all)
    if (value := number(said)) is not None:
        yield f"{value:.4f}"


def _tokens(text: str) -> list[str]:
    """Words without case, articles and punctuation; numbers stay as they are."""
    words = [word for word in re.split(r"[\s-]+(?=\D)|\s+", text.lower()) if word]
    plain = (word if number(word) is not None else word.strip(string.punctuation) for word in words)
    return [word for word in plain if word and word not in _ARTICLES]


def _f1(said: set[str], right: set[str]) -> float:
    both = len(said & right)
    precision = both / len(said) if said else 1.0
    recall = both / len(right) if right else 1.0
    return 2 * precision * recall / (precision + recall) if both else 0.0


def _read(file: Path) -> Iterator[Question]:
    for context in json.loads(file.read_text(encoding="utf-8")):
        rows = ("\t".join(cell.strip() for cell in row) for row in context["table"]["table"])
        paragraphs = sorted(context["paragraphs"], key=lambda one: int(one["order"]))
        above = "\n".join([*rows, *(one["text"] for one in paragraphs)])
        for one in context["questions"]:
            answers = one["answer"] if isinstance(one["answer"], list) else [one["answer"]]
            gold: dict[str, Any] = {key: one[key] for key in ("scale", "answer_type")} | {"answer": answers}
            answer = f"{_BETWEEN.join(map(_plain, answers))} {one['scale']}".strip()
            yield Question(one["uid"], f"{above}\n{one['question']}", answer, gold)


def _plain(answer: Any) -> str:
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)
