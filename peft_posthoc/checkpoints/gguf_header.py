"""A GGUF file's header without the lists of its tokenizer, which readers take entry by entry, for seconds."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct, unpack_from

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_START, _ARRAY_START = Struct("<4sIQQ"), Struct("<IQ")
_LENGTH, _KIND = Struct("<Q"), Struct("<I")
_STRING, _ARRAY = 8, 9
# Bytes of a value, by its kind.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ALIGNMENT = b"general.alignment"


@contextmanager
def header_alone(path: Path, *, but: tuple[str, ...] = ()) -> Iterator[tuple[Path, int]]:
    """A file with the same header but for the tokenizer's lists, which are empty, and zeros that take no room after it.

    Args:
        path: The file.
        but: What names of metadata begin with that is left out.

    Returns:
        The file, which is gone afterwards, and how many bytes earlier its tensors begin.

    Raises:
        ValueError: It is no GGUF file, or its bytes are in the order of another machine.
        struct.error: It ends too early.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        head, end, alignment = _without_lists(data, tuple(begin.encode() for begin in but))
        size = len(data)
    begins, begin = (-(-at // alignment) * alignment for at in (end, len(head)))
    with tempfile.TemporaryDirectory(prefix="phlora-", ignore_cleanup_errors=True) as folder:
        short = Path(folder) / path.name
        short.write_bytes(head)
        os.truncate(short, max(begin + size - begins, len(head)))
        yield short, begins - begin


def _without_lists(data: mmap.mmap, but: tuple[bytes, ...]) -> tuple[bytes, int, int]:
    """The header without them, where the header ends in the file, and what tensors are aligned to."""
    magic, version, tensors, count = _START.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError("it does not begin as one")
    if version & 0xFFFF == 0:
        raise ValueError("its bytes are in the order of another machine")
    if version not in _VERSIONS:
        raise ValueError(f"it is of version {version}")
    at, alignment, left_out = _START.size, 32, 0
    parts: list[bytes] = []
    for _ in range(count):
        begin, name_end = at, _after_string(data, at)
        name = data[begin + _LENGTH.size : name_end]
        value = name_end + _KIND.size
        (kind,) = _KIND.unpack_from(data, name_end)
        at = _after(data, value, kind)
        if name.startswith(but):
            left_out += 1
        elif kind == _ARRAY and name.startswith(b"tokenizer."):
            item, _ = _ARRAY_START.unpack_from(data, value)
            parts += [data[begin:value], _ARRAY_START.pack(item, 0)]
        else:
            parts.append(data[begin:at])
        if name == _ALIGNMENT:
            (alignment,) = _KIND.unpack_from(data, value)
    begin = at
    for _ in range(tensors):
        at = _after_string(data, at)
        (sides,) = _KIND.unpack_from(data, at)
        at += _KIND.size + 8 * sides + _KIND.size + 8
        if at > len(data):
            raise ValueError("it ends before its tensors")
    start = _START.pack(magic, version, tensors, count - left_out)
    return b"".join([start, *parts, data[begin:at]]), at, max(alignment, 1)


def _after(data: mmap.mmap, at: int, kind: int) -> int:
    """Where a value ends."""
    if kind == _STRING:
        return _after_string(data, at)
    if kind != _ARRAY:
        return at + _SIZES[kind]
    item, count = _ARRAY_START.unpack_from(data, at)
    at += _ARRAY_START.size
    if item in _SIZES:
        return int(at + count * _SIZES[item])
    for _ in range(count):
        at = _after(data, at, item)
    return at


def _after_string(data: mmap.mmap, at: int) -> int:
    (length,) = unpack_from("<Q", data, at)
    return int(at + _LENGTH.size + length)
