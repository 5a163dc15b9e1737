"""Notes of a run about itself, for when it is resumed or caught up with: its base and its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from hf_callbacks.base import Base
from peft_posthoc.errors import CheckpointError
from peft_posthoc.files import write_whole
from peft_posthoc.json_file import read_json

_FILE = "base.json"


class Memory(NamedTuple):
    """Everything that is written down."""

    base: Base
    request: dict[str, Any] | None = None
    """The request, as `Request.to_json` tells it; None where that cannot be told, or is not known."""
    best: bool | None = None
    """True where the run ends with its best checkpoint, not with its last one; None if that is not known."""


def remember(memory: Memory, work: Path) -> None:
    """Write it down.

    Args:
        memory: What.
        work: The run's `_phlora` folder.

    Raises:
        OSError: It cannot be written.
    """
    work.mkdir(parents=True, exist_ok=True)
    content = {**memory.base._asdict(), "request": memory.request, "best": memory.best}
    write_whole(work / _FILE, (json.dumps(content, indent=2) + "\n").encode())


def remembered(work: Path) -> Memory | None:
    """The notes of an earlier part of the run; None if it did not.

    Raises:
        CheckpointError: It is damaged.
    """
    path = work / _FILE
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        source, revision, how = (content[key] for key in Base._fields)
        request, best = content.get("request"), content.get("best")
        good = isinstance(source, str) and isinstance(revision, str | None) and isinstance(how, str)
        good &= request is None or isinstance(request, dict)
        if not good or not isinstance(best, bool | None):
            raise TypeError("a value has another type")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"`{path}` is damaged, and which model this run started from is not known") from error
    return Memory(Base(source, revision, how), request, best)
