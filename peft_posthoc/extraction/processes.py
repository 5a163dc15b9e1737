"""The processes that torchrun, or any other launcher, started: they share the weights out among themselves.

They never talk to one another. Each knows its share from its rank alone, and leaves what it did in the spool beside the
adapter; the first one waits until all is there. A launcher that restarts them restarts nothing that is done.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple


class Processes(NamedTuple):
    """This process among those that do the same work."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> Processes:
        """As the launcher says in `RANK` and `WORLD_SIZE`; alone if it says nothing."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def share(self, costs: Mapping[str, float]) -> list[str]:
        """This process' share of the weights, the costliest first: each goes to whoever has the least so far."""
        load = [0.0] * self.size
        mine: list[str] = []
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            target = load.index(min(load))
            load[target] += costs[name]
            if target == self.rank:
                mine.append(name)
        return mine


ALONE = Processes()
