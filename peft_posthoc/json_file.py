"""JSON that anybody may have written: bounded, and whatever is wrong with it is a `ValueError` that says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_posthoc.files import regular

LARGEST = 100_000_000
"""Bytes of a file; the largest index of shards on the hub has a twentieth."""

Hook = Callable[[dict[str, Any]], Any]


def read_json(path: Path, *, hook: Hook | None = None, unique: bool = False) -> Any:
    """The value in a file.

    Args:
        path: The file.
        hook: What makes a value of each object.
        unique: Whether a key that occurs twice in an object is a fault; else its last value is taken.

    Raises:
        ValueError: The file cannot be read, or holds no JSON; the message is the reason alone.
    """
    try:
        size = regular(path).stat().st_size
        if size > LARGEST:
            raise ValueError(f"it has {size} bytes, and at most {LARGEST} are read")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    return parse_json(text, hook=hook, unique=unique)


def parse_json(text: str, *, hook: Hook | None = None, unique: bool = False) -> Any:
    """The value that a text says; the rest as in `read_json`."""

    def made(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if unique and len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"it holds the key `{twice}` twice")
        return hook(found) if hook is not None else found

    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark, which JSON has not")
    try:
        return json.loads(text, object_pairs_hook=made if unique or hook is not None else None)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
