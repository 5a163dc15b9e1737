"""Code that comes with a model, or that its configuration names: none of it is run, nor offered to be run.

transformers runs such code where `trust_remote_code` is true, and asks on the terminal where it is None, which is its
default. Whoever opens a folder with it passes False. That is not handed on to the models within a model: their
configurations are read without what names code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# `auto_map` names files of code; the others may name a kernel, code that is fetched from the hub.
_NAMES_CODE = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)


def comes_with_code(config: Mapping[str, Any]) -> bool:
    """Tell whether a configuration, of a model or a tokenizer, names code that comes with it."""
    return bool(config.get("auto_map"))


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what names code, those within it too."""
    return {key: _without(value) for key, value in config.items() if key not in _NAMES_CODE}


def _without(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_code(value)
    return [_without(one) for one in value] if isinstance(value, list) else value


def not_run(config: Mapping[str, Any]) -> str:
    """The end of a sentence about a class that is missing: where there is code for it, that it is not run."""
    return "; the code that comes with it is not run" if comes_with_code(config) else ""


@contextmanager
def no_prompts() -> Iterator[None]:
    """Let no library read an answer from the terminal: standard input is empty meanwhile.

    For commands only: it is the whole process's. The file descriptor stays as it is, which a child of the callback
    watches.
    """
    before = sys.stdin
    with open(os.devnull, encoding="utf-8") as empty:
        sys.stdin = empty
        try:
            yield
        finally:
            sys.stdin = before
