"""How far a fit is, by its steps or by its time, whichever ends first."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

_POINTS = 6
"""How often a fit is judged, if there is time."""


class At(NamedTuple):
    """Where a fit is."""

    done: int = 0
    """Steps."""
    share: float = 0.0
    """Of the way."""
    judged: int = 0
    """Points on the way where it was judged."""
    seconds: float = 0.0
    """What it has taken, before an interruption too."""


class Pace:
    """What time does to a fit.

    Args:
        first: Where it goes on from.
        seconds: How long it may take from now on; None: as long as it likes.
        judging: How long it takes to judge it once, which is also the last that it does.
    """

    def __init__(self, first: At, seconds: float | None, judging: float) -> None:
        self._first, self._start, self._last, self._step = first, time.monotonic(), time.monotonic(), math.inf
        self._most = math.inf if seconds is None else max(seconds - judging, 1e-9)
        # No more than a quarter of the time goes into judging. Clocks may be too coarse to tell what that takes.
        self._points = max(1, int(min(_POINTS, self._most / max(4 * judging, 1e-9))))

    def at(self, done: int, steps: int, judged: int) -> At:
        """Where a fit is after some of its steps; called before each."""
        now = time.monotonic()
        if done > self._first.done:
            self._step = min(self._step, now - self._last)
        self._last = now
        # The step that comes takes time too.
        elapsed = now - self._start + (self._step if math.isfinite(self._step) else 0.0)
        timed = self._first.share + (1 - self._first.share) * elapsed / self._most
        share = min(1.0, max(done / steps, timed))
        return At(done, share, judged, self._first.seconds + now - self._start)

    def steps(self, at: At, steps: int) -> int:
        """How many steps it will have made, of all, when time ends it."""
        return min(steps, max(at.done, round(at.done / at.share))) if at.done else steps

    def due(self, at: At) -> int:
        """Points on the way that it has come past."""
        return int(at.share * self._points)
