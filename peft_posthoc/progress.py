"""Progress on stderr: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

# Seconds between two lines of a log. What is over sooner has none.
_EVERY = 60


class _Log:
    """Standard error as a log: a line for each state of a bar, in place of what draws it over itself."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(over: Iterable[Any] | None = None, *, progress: bool, **told: Any) -> Any:
    """Tqdm's bar, or what goes through it.

    Args:
        over: What is gone through; None where the bar is moved by hand.
        progress: Whether there is one.
        **told: As tqdm has it.
    """
    if not progress or sys.stderr is None or sys.stderr.isatty():
        return tqdm(over, disable=not progress, **told)
    return tqdm(over, file=_Log(), delay=_EVERY, mininterval=_EVERY, maxinterval=_EVERY, **told)
