"""MKFE, medical knowledge from extracts (Owkin, 2024): a trial's description, and its facts under their names.

The file's prompts say at length how to answer and then, after `Input:`, give the description; only that is asked here,
as the paper's prompts have no format instructions. *Key overlap* is the share of the right answer's keys that are said;
*value overlap* the share of those whose value is right too, without regard to case and spaces, and 0 where no key is.
An answer that is no dictionary, in Python's or JSON's writing, has no keys.
"""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .task import Question, Sets, needed, sample

HOME = "owkin/medical_knowledge_from_extracts"
ORIGIN = f"https://huggingface.co/datasets/{HOME}"
TRAIN, TEST = 1000, 200  # the paper's sizes, of a file that is not split


class MKFE:
    """A description, and a dictionary of facts."""

    about = f"Medical knowledge from extracts (Owkin, 2024), {ORIGIN}, Apache-2.0"
    metrics = ("key overlap", "value overlap")
    kind = "answers"
    home = HOME

    def load(self, source: Path) -> Sets:
        drawn = sample(list(_read(needed(source, "finetuning_train.csv", ORIGIN))), TRAIN + TEST)
        test = {one.id for one in sample(drawn, len(drawn) * TEST // (TRAIN + TEST))}
        return Sets([one for one in drawn if one.id not in test], [one for one in drawn if one.id in test])

    def score(self, question: Question, said: str) -> Mapping[str, float]:
        right, given = question.gold, facts(said) or {}
        keys = right.keys() & given.keys()
        values = sum(_plain(right[key]) == _plain(given[key]) for key in keys)
        return {"key overlap": len(keys) / len(right), "value overlap": values / len(keys) if keys else 0.0}


def facts(text: str) -> dict[str, Any] | None:
    """The dictionary that a text is, between its first brace and its last; None where it is none."""
    written = text[text.find("{") : text.rfind("}") + 1]
    for read in (ast.literal_eval, json.loads):
        try:
            found = read(written)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, dict):
            return {str(key).strip().lower(): value for key, value in found.items()}
    return None


def _plain(value: Any) -> str:
    return " ".join(str(value).lower().split())


def _read(file: Path) -> Iterator[Question]:
    """Rows whose answer is a dictionary with a key at least: another cannot be scored."""
    with file.open(encoding="utf-8", newline="") as lines:
        for place, row in enumerate(csv.DictReader(lines)):
            if right := facts(row["Answer"]):
                _, _, given = row["Question"].rpartition("Input:")
                yield Question(str(place), given.strip(), row["Answer"].strip(), right)
