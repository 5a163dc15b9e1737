"""A budget of time for a whole command."""

from __future__ import annotations

import math
import time


class Clock:
    """What is left of a budget.

    Args:
        minutes: The budget; None for none.
        since: When it began to run, as `time.monotonic()` told; now if None.
    """

    def __init__(self, minutes: float | None, since: float | None = None) -> None:
        start = time.monotonic() if since is None else since
        self._end = None if minutes is None else start + 60 * minutes

    @property
    def seconds(self) -> float | None:
        """What is left; None without a budget."""
        return None if self._end is None else self._end - time.monotonic()

    def until(self, share: float) -> float:
        """When a share of what is left will be over."""
        return math.inf if self.seconds is None else time.monotonic() + share * max(self.seconds, 0.0)
