"""Words for people: names, sizes, shares, and options as they are called where somebody reads of them."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Literal

Surface = Literal["python", "flags", "yaml"]
surface: ContextVar[Surface] = ContextVar("surface", default="python")
"""Where options are asked for: in Python, by flags of a command, or in a recipe of mergekit's."""

_FLAGS = {"rename": "map"}


def asked(option: str, value: Any = True) -> str:
    """An option as it is asked for: `head=True` in Python, `--head` on a command line, `head: true` in YAML.

    Args:
        option: Its name in Python.
        value: Its value; None for the name alone.
    """
    where = surface.get()
    if where == "flags":
        flag = f"--{_FLAGS.get(option, option).replace('_', '-')}"
        return flag if value is True or value is None else f"{flag} {value}"
    if value is None:
        return option
    if where == "yaml":
        return f"{option}: {str(value).lower() if isinstance(value, bool) else value}"
    return f"{option}={value!r}"


def percent(share: float | None) -> str:
    """A share for people."""
    return "-" if share is None else f"{100 * share:.1f}%"


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
