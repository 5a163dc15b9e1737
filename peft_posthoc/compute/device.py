"""Where to compute."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one.

    Raises:
        ValueError: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # One GPU for each process that torchrun started.
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"There is no device `{name}` here. Use `cpu`, or `auto` for a GPU if there is one."
        ) from error
    return device


def all_of(device: torch.device) -> list[torch.device]:
    """The devices that a name stands for: `cuda` for every GPU, where no number says which."""
    if device.type != "cuda" or device.index is not None:
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. A GPU copies it whole, from memory that it reads by itself, and nobody waits for that."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def in_bfloat16(device: torch.device, asked: bool) -> Any:
    """A context that products of matrices are of bfloat16 in, if asked for; of what follows PyTorch decides."""
    return torch.autocast(device.type, torch.bfloat16, enabled=asked)


class Devices:
    """Devices that several threads work on, each on one at a time; on one that is here twice, in streams of its own."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._free: SimpleQueue[tuple[torch.device, torch.cuda.Stream | None]] = SimpleQueue()
        for device in devices:
            self._free.put((device, torch.cuda.Stream(device) if device.type == "cuda" else None))

    @contextmanager
    def one(self) -> Iterator[torch.device]:
        """One that nobody else works on; waits for it."""
        device, stream = free = self._free.get()
        try:
            if stream is not None:  # What others have made of a model that is there is ready then.
                stream.wait_stream(torch.cuda.default_stream(device))
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                yield device
        finally:
            self._free.put(free)
