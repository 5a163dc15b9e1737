"""MedMCQA (Pal et al., 2022): medical questions with four options.

The answers of its test file are not public, so that the dev file is scored. Models are taught to say the option's
letter and its words. Either alone is right too; a letter with the words of another option is wrong. An answer that
names no option is wrong, and not `answered`. The paper's F1 is that of all answers together, where what names no option
is no answer: 2 * accuracy / (1 + answered). So its base models have an F1 of twice their accuracy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .task import Question, Sets, needed

ORIGIN = "https://github.com/medmcqa/medmcqa"
LETTERS = "ABCD"


class MedMCQA:
    """A question, and its options with their letters."""

    about = f"MedMCQA (Pal et al., 2022), {ORIGIN}, Apache-2.0"
    metrics = ("accuracy", "answered")
    kind = "answers"
    home = None

    def load(self, source: Path) -> Sets:
        return Sets(*(list(_read(needed(source, name, ORIGIN))) for name in ("train.json", "dev.json")))

    def score(self, question: Question, said: str) -> Mapping[str, float]:
        chosen = chosen_of(said, question.gold["options"])
        return {"accuracy": float(chosen == question.gold["right"]), "answered": float(chosen is not None)}


def chosen_of(said: str, options: Sequence[str]) -> int | None:
    """Which option an answer names, by letter, by its words, or both; None where they differ, or it names none."""
    found = re.match(r"\(?([A-D])(?![A-Za-z])[).:]*\s*(.*)", said.strip(), re.DOTALL)
    words = _plain(found[2] if found else said)
    by_words = [i for i, option in enumerate(options) if _plain(option) == words]
    if found is None:
        return by_words[0] if len(by_words) == 1 else None
    letter = LETTERS.index(found[1])
    return letter if not by_words or letter in by_words else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _read(file: Path) -> Iterator[Question]:
    """The rows of the authors' file, a JSON object a line; `cop` counts from 1."""
    with file.open(encoding="utf-8") as lines:
        for row in map(json.loads, filter(str.strip, lines)):
            options = [str(row[f"op{letter.lower()}"]) for letter in LETTERS]
            named = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
            right = row["cop"] - 1
            gold = {"options": options, "right": right}
            yield Question(row["id"], "\n".join([row["question"], *named]), named[right], gold)
