"""What a chat template puts around a user's turn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

_WORDS, _TRIED = 8, 512
"""Words that a template is tried with, and tokens that they are looked for among."""


class Turn(NamedTuple):
    """Token ids around what the user says."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    """Up to where the answer starts."""


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer, or None, knows how conversations are written."""
    return bool(getattr(tokenizer, "chat_template", None))


def written(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """A conversation as the tokenizer's chat template writes it, up to where the answer starts.

    Raises:
        Exception: Of any kind: templates are programs, and some refuse roles, or an order of them.
    """
    return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))


def turn_of(tokenizer: Any) -> Turn | None:
    """What stands around a user's only turn, whatever it says; None without a template, or one that takes no such turn.

    A space before what is said is part of its first token for most tokenizers, and so it is none of the template's.

    Args:
        tokenizer: transformers', or None.
    """
    if not has_template(tokenizer):
        return None
    try:
        turns = [written(tokenizer, [{"role": "user", "content": word}]) for word in _words(tokenizer)]
    except Exception:  # Some want other roles first, tools or images.
        return None
    if len({*map(tuple, turns)}) < 2:
        return None  # What is said does not stand in it.
    before = _shared(turns)
    after = _shared([turn[len(before) :][::-1] for turn in turns])[::-1]
    return Turn(before, after) if before or after else None


def _shared(texts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What all of them start with."""
    alike = takewhile(lambda tokens: len({*tokens}) == 1, zip(*texts, strict=False))
    return tuple(tokens[0] for tokens in alike)


def _words(tokenizer: Any) -> list[str]:
    """Words that the tokenizer tells apart."""
    found: dict[tuple[int, ...], str] = {}
    special, count = {*tokenizer.all_special_ids}, len(tokenizer)
    for token in random.Random(0).sample(range(count), min(count, _TRIED)):
        word = str(tokenizer.decode([token])).strip()
        if token not in special and word.isalnum() and len(found) < _WORDS:
            found.setdefault(tuple(tokenizer.encode(word, add_special_tokens=False)), word)
    return list(found.values())
