"""A part of a stored tensor that is looked at as a tensor of its own."""

from __future__ import annotations

import re
from typing import NamedTuple

_SPELLED = re.compile(r"(.+)\[(\d{1,18})(:?)\]", re.DOTALL)


class Part(NamedTuple):
    """One matrix of a stack, `NAME[3]`; or the rows of a matrix from one on, `NAME[32000:]`."""

    tensor: str
    """The name of the whole."""
    start: int
    """Which matrix, or the first of the rows."""
    to_end: bool = False
    """True for rows."""

    def __str__(self) -> str:
        """The name of the part."""
        return f"{self.tensor}[{self.start}{':' if self.to_end else ''}]"

    @classmethod
    def named(cls, name: str) -> Part | None:
        """The part that is called so; None if it is the name of a whole."""
        found = _SPELLED.fullmatch(name)
        return cls(found[1], int(found[2]), bool(found[3])) if found else None


def is_rest(name: str) -> bool:
    """Tell whether a name is that of rows which another checkpoint lacks."""
    part = Part.named(name)
    return part is not None and part.to_end
