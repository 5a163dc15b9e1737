"""The processes that torchrun, or any other launcher, started: they share the weights out among themselves.

They never talk to one another. Each knows its share from its rank alone, and leaves what it did in the spool beside the
adapter; the first one, or each, waits until all is there. A launcher that restarts them restarts nothing that is done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from peft_posthoc.errors import PosthocError, ShareDone


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


@contextmanager
def told_by_first(processes: Processes) -> Iterator[None]:
    """What goes wrong in the `with` block, which does the same in every process, is told by the first.

    Raises:
        ShareDone: It went wrong, and this is another.
    """
    try:
        yield
    except (PosthocError, ValueError) as error:
        if processes.rank:
            raise ShareDone("The first process tells what went wrong.") from error
        raise
