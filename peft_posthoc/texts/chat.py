"""What a chat template puts around a user's turn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

_TRIED = ("a", "one", "what", "Zebra", "7", "Hello")
"""Words that a template is tried with."""
_DRAWN = 512
"""Tokens among which others are looked for, where the tokenizer knows too few of these."""


class Turn(NamedTuple):
    """Token ids around what the user says."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    """Up to where the answer starts."""


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer, or None, knows how conversations are written."""
    return bool(getattr(tokenizer, "chat_template", None))


def written(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, parts: bool = False) -> list[int]:
    """A conversation as the tokenizer's chat template writes it, up to where the answer starts.

    Args:
        tokenizer: transformers'.
        messages: With `role` and `content`.
        parts: Give contents that are texts as lists of one part (see `takes_parts`).

    Raises:
        ValueError: A part of a content is no text, and the template takes texts alone.
        Exception: Of any kind: templates are programs, and some refuse roles, or an order of them.
    """
    put = _in_parts if parts else _joined
    # Who calls a tool may say nothing.
    given = [one if one.get("content") is None else {**one, "content": put(one["content"])} for one in messages]
    return list(tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=False))


def _in_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _joined(content: Any) -> str:
    """As servers give a content in parts to a template that takes texts: with an end of line between them."""
    if isinstance(content, str):
        return content
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type", "text") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise ValueError("it takes texts alone, and a part of what is said is none.")
    return "\n".join(map(str, texts))


def takes_parts(tokenizer: Any) -> bool:
    """Whether a chat template wants contents as lists of parts, of text or images, and leaves out what is no list."""
    return _turns(tokenizer, parts=False) is None and _turns(tokenizer, parts=True) is not None


def turn_of(tokenizer: Any) -> Turn | None:
    """What stands around what a user says, in turns that say a word; None without a template that takes such turns.

    A space before what is said is part of its first token for most tokenizers, and so it is none of the template's.

    Args:
        tokenizer: transformers', or None.
    """
    if not has_template(tokenizer):
        return None
    turns = _turns(tokenizer, parts=False) or _turns(tokenizer, parts=True)
    if turns is None:
        return None
    before = _shared(turns)
    after = _shared([turn[len(before) :][::-1] for turn in turns])[::-1]
    return Turn(before, after) if before or after else None


def _turns(tokenizer: Any, *, parts: bool) -> list[list[int]] | None:
    """Turns of a user that say a word each; None where the template takes none, or leaves the word out."""
    try:
        words = _words(tokenizer)
        turns = [written(tokenizer, [{"role": "user", "content": word}], parts=parts) for word in words]
    except Exception:  # Some want other roles first, tools or images.
        return None
    return turns if len({*map(tuple, turns)}) > 1 else None


def _words(tokenizer: Any) -> list[str]:
    """Words that the tokenizer tells apart."""
    found = {tuple(tokenizer.encode(word, add_special_tokens=False)): word for word in _TRIED}
    if len(found) < len(_TRIED):
        special, known = {*tokenizer.all_special_ids}, sorted(tokenizer.get_vocab().values())
        for token in random.Random(0).sample(known, min(len(known), _DRAWN)):
            word = str(tokenizer.decode([token])).strip()
            if token not in special and word.isalnum() and len(found) < len(_TRIED):
                found.setdefault(tuple(tokenizer.encode(word, add_special_tokens=False)), word)
    return list(found.values())


def _shared(texts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What all of them start with."""
    alike = takewhile(lambda tokens: len({*tokens}) == 1, zip(*texts, strict=False))
    return tuple(tokens[0] for tokens in alike)
