"""Words for people: names, sizes, shares, and options as they are called where somebody reads of them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from html import escape
from typing import Any, Literal


def percent(share: float | None) -> str:
    """A share for people."""
    return "-" if share is None else f"{100 * share:.1f}%"


def share_of_all(energy: float, unknown: float) -> str:
    """What is held of a whole fine-tune, and what share of its values that cannot be told of."""
    # Below this they are a few counters, or buffers that one side does not save.
    return percent(energy) if unknown < 1e-4 else f"about {percent(energy)} ({percent(unknown)} unknown)"


def sized(count: int | None) -> str:
    """A number of bytes for people."""
    return "-" if count is None else size(count)


def shorten(name: str, width: int = 52) -> str:
    """A name cut from the left, where long ones are alike; a line break in it is spelled out."""
    name = name.replace("\n", "\\n")
    return name if len(name) <= width else f"...{name[-(width - 3) :]}"


def size(count: float) -> str:
    """A number of bytes for people: 1 kB is 1000 bytes."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number with its noun: `1 tensor is`, `2 tensors are`.

    Args:
        count: How many.
        one: The words behind a one.
        many: Behind any other number; by default with an `s`.
    """
    return f"{count} {one if count == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """A time for people."""
    for unit, of_next in (("s", 120), ("min", 120)):
        if seconds < of_next:
            return f"{max(seconds, 1):.0f} {unit}"
        seconds /= 60
    return f"{seconds:.1f} h"


def took(seconds: tuple[float, float] | None) -> str:
    """The shortest and the longest time that work may take, as a sentence behind others; nothing where not known."""
    return "" if seconds is None else f" Time: {duration(seconds[0])} to {duration(seconds[1])}, without fetching."


def as_share(text: str) -> float:
    """The share that somebody writes: `0.9` or `90%`.

    Raises:
        ValueError: It is no number.
    """
    number = text.strip()
    return float(number[:-1]) / 100 if number.endswith("%") else float(number)


_TYPES = {
    **dict.fromkeys(("bf16",), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float"), "float32"),
}


def type_name(text: str) -> str:
    """PyTorch's name of a type, which people also call `bf16`, `fp16` or `half`."""
    name = text.strip().removeprefix("torch.")
    return _TYPES.get(name.lower(), name)


def as_html(text: str) -> str:
    """A table for a terminal, in a notebook."""
    return f"<pre>{escape(text)}</pre>"


Surface = Literal["python", "command line", "mergekit"]
"""Where options are given: as keywords, as flags, or in the YAML of a merge."""

_SURFACE: ContextVar[Surface] = ContextVar("surface", default="python")
# Options whose flag, and whose key in YAML, is not called as the keyword is.
_FLAGS = {"rename": "map", "size": "budget", "most": "max-rank", "least": "min-rank", "multiple": "round-to"}
# Keys of a merge's `parameters`. What else is asked of an adapter are flags of `mergekit-phlora`.
_OF_A_MERGE = ("rank", "energy", "error", "max_rank", "min_rank", "round_to", "embeddings", "head", "exact")
# Flags that switch a keyword off.
_OFF = {"outputs": "weights-only"}


@contextmanager
def asked_on(surface: Surface) -> Iterator[None]:
    """Word options as they are given there, for what goes wrong in the `with` block."""
    before = _SURFACE.set(surface)
    try:
        yield
    finally:
        _SURFACE.reset(before)


def surface() -> Surface:
    """Where the options were given that we work by."""
    return _SURFACE.get()


def asked(option: str, value: Any = True) -> str:
    """An option as whoever asked gives it: `head=True`, `--head` or `head: true`.

    What is kept in a file, such as a report, is read by others: there it is `as_flag`.

    Args:
        option: The keyword of Python.
        value: True for a switch that is on; None where it is the user's to find.
    """
    key = _FLAGS.get(option, option).replace("-", "_")
    if surface() == "command line" or (surface() == "mergekit" and key not in _OF_A_MERGE):
        return as_flag(option, value)
    if surface() == "mergekit":
        return f"{key}: {'...' if value is None else value if isinstance(value, str) else json.dumps(value)}"
    return f"{option}={'...' if value is None else repr(value)}"


def as_flag(option: str, value: Any = True) -> str:
    """An option of the command line, to be copied into a shell."""
    name = _OFF[option] if value is False else _FLAGS.get(option, option)
    flag = f"--{name.replace('_', '-')}"
    return flag if value is None or isinstance(value, bool) else f"{flag} {shlex.quote(str(value))}"
