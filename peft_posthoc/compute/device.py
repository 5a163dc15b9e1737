"""Where to compute."""

from __future__ import annotations

import os

import torch


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is the first GPU if there is one.

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
