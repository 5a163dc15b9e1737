"""A weight that is stored as codes: what it is made of, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Header


class Coded(NamedTuple):
    """A weight, told from headers, that is decoded when it is read."""

    sources: tuple[str, ...]
    """The codes, and what lies beside them."""
    header: Header
    """Of the weight."""
    make: Callable[..., Tensor]
    """From the sources, in their order, the weight."""
    steps: Callable[..., Tensor]
    """From the sources, in their order, the grid's step at each value."""
