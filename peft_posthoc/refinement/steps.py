"""Steps of an optimiser over an adapter's factors: relative to the size of each, up and then down again."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter


class Steps:
    """Adam, with a rate for each factor relative to the root mean square of its values.

    Args:
        factors: What is moved; those that are all zero stay so.
        lr: Relative to their size.
    """

    def __init__(self, factors: Mapping[str, Parameter], lr: float) -> None:
        self._lr = lr
        groups = [{"params": [own], "size": _size(own)} for own in factors.values() if own.any()]
        self._adam = torch.optim.Adam(groups, lr=0.0)

    def step(self, loss: Tensor, share: float) -> None:
        """Move down the loss, `share` of the way through."""
        for group in self._adam.param_groups:
            group["lr"] = self._lr * group["size"] * _pace(share)
        self._adam.zero_grad()
        loss.backward()
        self._adam.step()


def _size(factor: Tensor) -> float:
    """Root mean square of a factor's values that are not padding."""
    values = factor.detach()
    return float(values.norm() / max(1, int(values.count_nonzero())) ** 0.5)


def _pace(share: float) -> float:
    """The rate after a share of the way: up within a twentieth, then down along a cosine."""
    return min(1.0, (share + 0.01) / 0.05) * 0.5 * (1 + math.cos(math.pi * share))


def copies(factors: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """The values of the factors, as they are now."""
    return {name: own.detach().clone() for name, own in factors.items()}


@torch.no_grad()
def put(factors: Mapping[str, Parameter], values: Mapping[str, Tensor]) -> None:
    """Give the factors of a live model other values."""
    for name, own in factors.items():
        own.copy_(values[name])
