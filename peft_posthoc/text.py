"""Names, sizes and shares for people."""

from __future__ import annotations


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
