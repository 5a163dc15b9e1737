"""What a chat template puts around a user's turn."""

from __future__ import annotations

from typing import Any, NamedTuple

_MARK = "phlora-user-turn"


class Turn(NamedTuple):
    """Token ids around what the user says."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    """Up to where the answer starts."""


def turn_of(tokenizer: Any) -> Turn | None:
    """A user's only turn, as the tokenizer's chat template writes it; None without a template, or one of its own kind.

    Args:
        tokenizer: transformers', or None.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
    except Exception:  # Templates are programs; some want other roles, tools or images.
        return None
    before, mark, after = text.partition(_MARK)
    if not mark or not after:
        return None
    return Turn(*(tuple(tokenizer.encode(part, add_special_tokens=False)) for part in (before, after)))
