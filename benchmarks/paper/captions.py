"""ROUGE-L (Lin, 2004) and CIDEr (Vedantam et al., 2015) of one caption, as captions are scored since COCO's evaluation.

Its package, `pycocoevalcap`, is of 2020 and starts Java to split words; here they are letters and digits in lower case.
Its CIDEr is the paper's CIDEr-D: counts are clipped, and a caption of another length loses.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

BETA = 1.2  # of ROUGE-L: how much recall weighs
SIGMA = 6.0  # of CIDEr-D: by how many words a length may be off
LONGEST = 4  # n-grams


def words(text: str) -> list[str]:
    """Without case and punctuation."""
    return re.findall(r"\w+(?:'\w+)?", text.lower())


def rouge_l(said: str, references: Sequence[str]) -> float:
    """The F of the longest common subsequence: with the best precision and the best recall of all references."""
    given, right = words(said), [words(one) for one in references]
    common = [_common(given, one) for one in right]
    precision = max(common) / max(len(given), 1)
    recall = max(length / max(len(one), 1) for length, one in zip(common, right, strict=True))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        before = row[:]
        for j, against in enumerate(other, 1):
            row[j] = before[j - 1] + 1 if word == against else max(before[j], row[j - 1])
    return row[-1]


class Cider:
    """Captions by the n-grams that tell one clip from others.

    Args:
        references: The captions of each clip that is scored; in how many clips an n-gram stands is its weight.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self.clips = len(references)
        self.frequency = Counter(
            gram for one in references for gram in {g for text in one for g in _grams(words(text))}
        )

    def __call__(self, said: str, references: Sequence[str]) -> float:
        """From 0 to 10."""
        given = words(said)
        one = self._weights(given)
        return 10 * sum(self._likeness(one, len(given), words(text)) for text in references) / len(references)

    def _weights(self, text: Sequence[str]) -> list[dict[tuple[str, ...], float]]:
        found: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in Counter(_grams(text)).items():
            found[len(gram) - 1][gram] = count * math.log(self.clips / max(self.frequency[gram], 1))
        return found

    def _likeness(self, one: Sequence[dict[tuple[str, ...], float]], length: int, reference: Sequence[str]) -> float:
        total = 0.0
        for given, right in zip(one, self._weights(reference), strict=True):
            both = sum(min(given[gram], right[gram]) * right[gram] for gram in given.keys() & right.keys())
            sizes = math.hypot(*given.values()) * math.hypot(*right.values())
            total += both / sizes if sizes else 0.0
        return total / LONGEST * math.exp(-((length - len(reference)) ** 2) / (2 * SIGMA**2))


def _grams(text: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(text) - n + 1)]
