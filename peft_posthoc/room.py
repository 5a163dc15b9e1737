"""The folder beside an output in which it is made. A killed process leaves its own; the next one there removes it."""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OLD = "old"
"""In a room: what was at the output's place before. A room is never removed with it."""

_END = ".phlora"
_LOCK = "lock"
# filelock's ways to say that a file cannot be locked, or is locked by another.
_UNLOCKED = (OSError, NotImplementedError)


@contextmanager
def room_beside(place: Path) -> Iterator[Path]:
    """Give a new folder beside a place: moving something from there to the place is a rename within one file system.

    It is locked as long as this process lives. What killed ones left goes first.

    Args:
        place: Where the output is to be. The folder above it is there.

    Yields:
        The folder, which goes at the end.

    Raises:
        OSError: No folder can be made there.
    """
    from filelock import FileLock  # What only reads need not wait for it.

    clear_beside(place)
    room = Path(tempfile.mkdtemp(prefix=_start(place), suffix=_END, dir=place.parent))
    lock = FileLock(room / _LOCK, blocking=False)
    try:
        with suppress(*_UNLOCKED):  # Not every file system has locks: then a killed process' room stays.
            lock.acquire()
        yield room
    finally:
        if not (room / OLD).exists():
            shutil.rmtree(room, ignore_errors=True)
        lock.release()


def clear_beside(place: Path) -> None:
    """Remove what processes that were killed left beside a place."""
    from filelock import FileLock

    for left in place.parent.glob(f"{glob.escape(_start(place))}????????{_END}"):
        # One without a lock may have been made in this moment.
        if (left / _LOCK).exists() and not (left / OLD).exists():
            with suppress(*_UNLOCKED), FileLock(left / _LOCK, blocking=False):
                shutil.rmtree(left)


def _start(place: Path) -> str:
    return f".{place.name[:100]}."
