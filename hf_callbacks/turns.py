"""The first process works, and the others wait for it without a collective."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(seconds=30)  # a single wait; there are as many as it takes
_turns = itertools.count()


def are_several() -> bool:
    """Tell whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def others_wait(*, first: bool) -> Iterator[None]:
    """Let the other processes wait at the end of the block until the first process has left it.

    A process that goes on alone would soon wait for the first one in a collective of the training, which ends the
    run when the process group's timeout has passed. This wait has no timeout, and calls no collective: it reads a key
    of the store that the processes found one another by.

    Every process must enter this at the same points of the training, as it does in the Trainer's events.

    Args:
        first: Whether this is the first process.
    """
    key = f"phlora/{next(_turns)}"  # counted without processes too: the group may be made between two turns
    try:
        yield
    finally:
        if are_several():
            try:
                # The only way to it: torch.distributed has no public one.
                store = dist.distributed_c10d._get_default_store()
                signal(store, key) if first else wait(store, key)
            except RuntimeError as error:  # the first process or its store is gone
                logger.warning("phlora: the processes could not wait for the first one: %s. Training goes on.", error)


def signal(store: Any, key: str) -> None:
    """Let go on who waits for the key."""
    store.set(key, "done")


def wait(store: Any, key: str, *, patience: timedelta = _PATIENCE) -> None:
    """Wait for the key as long as it takes.

    Args:
        store: The processes' own.
        key: What `signal` is given.
        patience: How long a single wait is.

    Raises:
        RuntimeError: The store is gone.
    """
    while True:
        try:
            store.wait([key], patience)
            return
        except dist.DistStoreError as error:
            if "timeout" not in str(error).lower():
                raise
