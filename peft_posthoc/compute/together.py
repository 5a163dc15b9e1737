"""Processes that do one piece of work together, each a part of it, with accelerate's collectives between them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from peft_posthoc.errors import PosthocError, ShareDone, one_line

T = TypeVar("T")


class Together:
    """This process among those that do the same work. All of them make the same calls in the same order.

    Args:
        rank: Of this process.
        size: How many there are.
        device: Where this one computes.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.split = False
        """Whether models are split among the processes: whenever one runs a model, all do."""
        if size > 1:
            from accelerate import PartialState

            PartialState(cpu=device is None or device.type == "cpu")
            self._wrong = self.first(f"wrong in {time.time_ns()}")

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What this process takes."""
        return items[self.rank :: self.size]

    def turns(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """What this process takes, and True for each; where others take one more, any one and False.

        Others may need this one's part of a model, whatever it is run on.
        """
        own = [(item, True) for item in self.share(items)]
        return [*own, *[(items[0], False)] * (-(-len(items) // self.size) - len(own))]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up what each process has, in place; all have the same then."""
        if self.size > 1 and tensors:
            from accelerate.utils import reduce

            flat = reduce(torch.cat([x.detach().flatten() for x in tensors]), "sum")
            for own, part in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
                own.detach().copy_(part.view_as(own))

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of every process, as they were before each took its share."""
        if self.size == 1:
            return list(items)
        from accelerate.utils import gather_object

        parts: list[Sequence[T]] = gather_object([items])
        longest = max(map(len, parts))
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def first(self, value: T) -> T:
        """What the first process has."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        found: T = broadcast_object_list([value])[0]
        return found

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What goes wrong in one process ends all: the first tells of it, the others are done.

        There are no calls of this class in the `with` block. Where models are split each run of one is such a call:
        what goes wrong is for `alike` then.

        Raises:
            PosthocError: Something went wrong in another process, and this is the first.
            ShareDone: Something went wrong, and this is not the first.
        """
        if self.size == 1 or self.split:
            yield
            return
        wrong: Exception | None = None
        try:
            yield
        except Exception as error:
            wrong = error
        from accelerate.utils import gather_object

        told: list[str] = gather_object(["" if wrong is None else one_line(wrong)])
        if any(told) and self.rank:
            raise ShareDone("Another process tells what went wrong.") from wrong
        if wrong is not None:
            raise wrong
        if any(told):
            at, text = next((i, text) for i, text in enumerate(told) if text)
            raise PosthocError(f"{text} (In process {at} of {self.size}.)")

    @contextmanager
    def alike(self) -> Iterator[None]:
        """What goes wrong in the `with` block is told once: by the first process that it goes wrong in.

        Other than in `agreed` it may be all of them, or one alone, which the others wait for until whoever started them
        ends them, or it is gone.

        Raises:
            ShareDone: Something went wrong, and another process tells of it.
        """
        try:
            yield
        except ShareDone:
            raise
        except Exception as error:
            if self.size > 1 and self._is_told():
                raise ShareDone("Another process tells what went wrong.") from error
            raise

    def _is_told(self) -> bool:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        try:  # The launcher's, which mostly outlives a process that fails.
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=10))
            return bool(store.add(self._wrong, 1) > 1)
        except RuntimeError:
            return self.rank > 0  # It went with the first process.


ALONE = Together()
