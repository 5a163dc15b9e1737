"""Random numbers of a training, as they were before something else that draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def numbers_kept() -> Iterator[None]:
    """Leave Python's, numpy's and PyTorch's generators, of every device, as they are."""
    before = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
