"""Files that can be read without waiting: a pipe, socket or device in a folder would hang whoever opens it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from peft_posthoc.errors import CheckpointError

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular(path: Path) -> Path:
    """The path itself, seen not to be a pipe, a socket or a device before anybody opens it.

    Raises:
        OSError: It is one, or is not there.
    """
    if kind := _KINDS.get(stat.S_IFMT(path.stat().st_mode)):
        raise OSError(f"it is {kind}, not a regular file")
    return path


def check_folder(folder: str | os.PathLike[str]) -> None:
    """See that a library which opens what it likes of a folder will not hang.

    Raises:
        CheckpointError: There is a pipe, a socket or a device in it.
    """
    for path in sorted(Path(folder).iterdir()):
        try:
            regular(path)
        except FileNotFoundError:
            continue  # A link to nowhere: to open it fails.
        except OSError as error:
            raise CheckpointError(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}.") from error
