"""The folder beside an output in which it is made. A killed process leaves its own; the next one there removes it."""

from __future__ import annotations

import errno
import glob
import os
import platform
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

OLD = "old"
"""In a room: what was at the output's place before. A room is never removed with it."""

# Some file systems keep locks to one machine: another one's rooms are nobody's to judge here.
_END = f".{zlib.crc32(platform.node().encode()):08x}.phlora"


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
    clear_beside(place)
    room, held = _new(place)
    try:
        yield room
    finally:
        if not (room / OLD).exists():
            shutil.rmtree(room, ignore_errors=True)
        _let_go(held)


def clear_beside(place: Path) -> None:
    """Remove what processes of this machine that were killed left beside a place."""
    place = Path(os.path.realpath(place))
    for left in place.parent.glob(f"{glob.escape(_start(place))}????????{glob.escape(_END)}"):
        with suppress(OSError):  # Of another user, or gone by now.
            held = _lock(left)
            try:
                if held is not None and not (left / OLD).exists():
                    shutil.rmtree(left)
            finally:
                _let_go(held)


def _new(place: Path) -> tuple[Path, int | None]:
    """A folder, and the lock on it; None where the file system has none: what is left of it then stays."""
    while True:
        room = Path(tempfile.mkdtemp(prefix=_start(place), suffix=_END, dir=place.parent))
        try:
            held = _lock(room)
        except FileNotFoundError:
            continue  # Another process took it for one that is left.
        except OSError as error:
            if error.errno == errno.EAGAIN:
                continue  # It is about to.
            return room, None
        if held is None or _is(room, held):
            return room, held
        _let_go(held)


def _lock(folder: Path) -> int | None:
    """Lock a folder, until what comes back is let go; None on systems that have no such locks.

    Raises:
        OSError: Another process holds it, or the file system has no locks.
    """
    if sys.platform == "win32":
        return None
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(held)
        raise
    return held


def _let_go(held: int | None) -> None:
    if held is not None:
        with suppress(OSError):
            os.close(held)


def _is(folder: Path, held: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(held))
    except FileNotFoundError:
        return False


def _start(place: Path) -> str:
    return f".{place.name[:100]}."
