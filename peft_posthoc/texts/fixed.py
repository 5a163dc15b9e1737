"""Tokens that most texts have in common, such as a chat template's: no model ever has to say them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile


def fixed_places(texts: Sequence[Sequence[int]], *, starts: bool = False) -> list[tuple[int, ...]]:
    """Places of the tokens that most texts start with; where they are starts of texts, of those that most end with too.

    A text that stands there alone is no start, but all that there is.
    """
    if not starts and all(text == texts[0] for text in texts):
        return [()] * len(texts)
    first, last = _alike(texts), _alike([text[::-1] for text in texts]) if starts else [0] * len(texts)
    return [
        (*range(one), *range(max(one, len(text) - other), len(text)))
        for text, one, other in zip(texts, first, last, strict=True)
    ]


def _alike(texts: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens each text has in common with what more than half of the different ones start with."""
    left, most = {tuple(text) for text in texts}, list[int]()
    half = len(left) / 2
    while True:
        found = Counter(text[len(most)] for text in left if len(text) > len(most)).most_common(1)
        if not found or found[0][1] <= half:
            break
        left = {text for text in left if text[len(most) : len(most) + 1] == found[0][:1]}
        most.append(found[0][0])
    return [sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(text, most, strict=False))) for text in texts]
