"""One file, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from peft_posthoc.errors import OutputError


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file: beside its place first, and then moved there.

    Args:
        path: Of a file that is replaced, or is not there yet. A link stays one: the file that it leads to is written.
            A pipe or a device is written to as it is.
        content: All of it; text becomes UTF-8.

    Raises:
        OutputError: It cannot be written. What was there still is.
    """
    content = content.encode() if isinstance(content, str) else content
    try:
        _write(Path(path), content)
    except OSError as error:
        raise OutputError(f"`{path}` could not be written: {error.strerror or error}.") from error


def _write(path: Path, content: bytes) -> None:
    if path.exists() and not path.is_file():
        path.write_bytes(content)  # There is nothing to move onto.
        return
    target = Path(os.path.realpath(path))
    handle, partial = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # Some file systems tell only then that they are full.
        os.chmod(partial, _mode(target))
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _mode(target: Path) -> int:
    """The file's own mode, or that of a new file."""
    if target.exists():
        return target.stat().st_mode & 0o7777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
