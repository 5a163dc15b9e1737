"""Threads that work ahead of who takes their results, with a bound on what is in memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Self, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_here = threading.local()


class Workers:
    """Threads that end with the `with` block, however that ends.

    Left to a generator's end, they would be joined by the garbage collector at a moment when Python's own locks may be
    held.

    Args:
        threads: How many.
        waiting: Items that may wait for a thread.
        room: The sum of sizes that may be in work at a time; an item that is larger is worked on alone.
        torch_threads: Of each thread, those that PyTorch may use; None: as many as it does.
    """

    def __init__(
        self, threads: int = 1, *, waiting: int = 0, room: float = math.inf, torch_threads: int | None = None
    ) -> None:
        self._most, self._room, self._before = threads + waiting, room, torch_threads and torch.get_num_threads()
        self._threads, self._torch_threads = threads, torch_threads
        self._pool = ThreadPoolExecutor(threads, initializer=self._begin)

    def _begin(self) -> None:
        _here.workers = self
        if self._torch_threads:
            torch.set_num_threads(self._torch_threads)

    def __enter__(self) -> Self:
        """Nothing starts before there is work."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the threads; what waits is not begun."""
        self._pool.shutdown(cancel_futures=True)
        if self._before:  # Setting them in one thread changes what others find.
            torch.set_num_threads(self._before)

    def map(self, work: Callable[[T], R], items: Iterable[T], size: Callable[[T], int] = lambda _: 0) -> Iterator[R]:
        """The results, each as it is ready: those of one thread in the items' order. Raises what the work raises."""
        running: dict[Future[R], int] = {}

        def first() -> R:
            done = wait(running, return_when=FIRST_COMPLETED).done
            future = next(future for future in running if future in done)
            del running[future]
            return future.result()

        for item in items:
            while running and (len(running) >= self._most or sum(running.values()) + size(item) > self._room):
                yield first()
            running[self._pool.submit(work, item)] = size(item)
        while running:
            yield first()

    def help(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """The results, in the items' order, of work that one of these threads does, and those with it that are idle."""
        left, found = iter(enumerate(items)), dict[int, R]()
        taking, graded = threading.Lock(), torch.is_grad_enabled()

        def take() -> None:
            while True:
                with taking:
                    one = next(left, None)
                if one is None:
                    return
                with torch.set_grad_enabled(graded):  # It is each thread's own.
                    found[one[0]] = work(one[1])

        helpers = [self._pool.submit(take) for _ in range(min(self._threads, len(items)) - 1)]
        try:
            take()
        finally:
            # Those that have not begun, as other work is before them, would find nothing left.
            begun = [helper for helper in helpers if not helper.cancel()]
            wait(begun)
        for helper in begun:
            helper.result()
        return [found[at] for at in range(len(items))]


def spread(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """The results, in the items' order; in a thread of `Workers`, others of them help as far as they are idle."""
    workers: Workers | None = getattr(_here, "workers", None)
    return list(map(work, items)) if workers is None or len(items) < 2 else workers.help(work, items)
