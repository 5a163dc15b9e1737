"""What the machine holds: files in its page cache, memory to spare, and the memory of this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def files(*folders: Path) -> Iterator[Path]:
    return (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())


def read(*folders: Path) -> int:
    """Read every file to its end, which brings it into the page cache; returns the bytes."""
    buffer = bytearray(1 << 22)
    total = 0
    for path in files(*folders):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def drop(*folders: Path) -> None:
    """Take every file out of the page cache, but for pages that some process has mapped."""
    for path in files(*folders):
        with path.open("rb") as file:
            # What is not written yet cannot be dropped.
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def available() -> int:
    """Bytes of memory that new processes can have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def memory() -> dict[str, int]:
    """Bytes of this process now: `Anonymous`, and `Rss` with the pages of mapped files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    pairs = (line.split(":") for line in lines)
    sizes = {key: int(value.split()[0]) * 1024 for key, value in pairs}
    return {key: sizes[key] for key in ("Anonymous", "Rss")}
