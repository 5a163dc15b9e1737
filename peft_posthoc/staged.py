"""Output that is there whole or not at all: made beside its place, and moved into it at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from peft_posthoc.errors import AdapterError


@contextmanager
def staged(target: str | os.PathLike[str], *, what: str) -> Iterator[Path]:
    """Give a path to write a file or a folder to, which takes the target's place when the `with` block ends well.

    What is at the target goes then, so see before whether it may. Folders above it are made, and go again if nothing
    was written.

    Args:
        target: Where the output is to be.
        what: What messages call it: `The adapter`.

    Yields:
        A path in a new folder beside the target: moving it is a rename within one file system.

    Raises:
        AdapterError: It cannot be written.
    """
    place = Path(target).absolute()
    missing = [path for path in place.parents if not path.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as error:
        raise AdapterError(f"Cannot write to `{Path(target).parent}`: {error.strerror or error}.") from error
    try:
        yield room / "new"
        if place.exists():
            place.rename(room / "old")
        (room / "new").rename(place)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"{what} could not be written to `{target}`: {reason}. Nothing was left.") from error
    finally:
        if (room / "old").exists() and not place.exists():
            (room / "old").rename(place)
        shutil.rmtree(room, ignore_errors=True)
        if not place.exists():
            for path in missing:
                path.rmdir()
