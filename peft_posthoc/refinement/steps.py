"""Steps of an optimiser over an adapter's factors: relative to the size of each, up and then down again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from peft_posthoc.adapters.names import PREFIX
from peft_posthoc.compute.together import ALONE, Together
from peft_posthoc.errors import PosthocError


class Steps:
    """Adam, with a rate for each factor relative to the root mean square of its values.

    Args:
        factors: What is moved; those that are all zero stay so.
        lr: Relative to their size.
        together: Processes whose losses add up.
    """

    def __init__(self, factors: Mapping[str, Parameter], lr: float, together: Together = ALONE) -> None:
        self._lr, self._together = lr, together
        self._moved = movable_by_steps(factors)
        groups = [{"params": [own], "size": _size(own)} for own in self._moved.values()]
        self._adam = torch.optim.Adam(groups, lr=0.0)

    def step(self, loss: Tensor, share: float) -> None:
        """Move down the loss, `share` of the way through."""
        for group in self._adam.param_groups:
            group["lr"] = self._lr * group["size"] * _pace(share)
        self._adam.zero_grad()
        with self._together.agreed():
            loss.backward()
        if self._together.size > 1:
            grads = []
            for own in self._moved.values():
                own.grad = torch.zeros_like(own) if own.grad is None else own.grad
                grads.append(own.grad)
            self._together.sum(grads)
        self._adam.step()

    def unread(self) -> list[str]:
        """The factors that no loss has depended on so far; none before the first step."""
        known = self._adam.state
        if not known:
            return []
        return [name for name, own in self._moved.items() if own not in known or not known[own]["exp_avg_sq"].any()]

    def tensors(self) -> dict[str, Tensor]:
        """What Adam knows of the steps so far."""
        known = self._adam.state_dict()["state"]
        return {f"{i}.{key}": value for i, one in known.items() for key, value in one.items()}

    def restore(self, tensors: Mapping[str, Tensor], lr: float) -> None:
        """Go on from what it knew, at the rate that it had."""
        self._lr = lr
        known: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            i, key = name.split(".", 1)
            known.setdefault(int(i), {})[key] = value
        self._adam.load_state_dict({**self._adam.state_dict(), "state": known})


def movable_by_steps(factors: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The factors that have a size."""
    return {name: own for name, own in factors.items() if own.any()}


def check_steps(factors: Mapping[str, Parameter]) -> None:
    """See that there are some.

    Raises:
        PosthocError: There are none.
    """
    if not movable_by_steps(factors):
        raise PosthocError("Every factor of the adapter is zero: there is nothing that could be refined.")


def still(factors: Mapping[str, Parameter]) -> dict[str, str]:
    """Modules with a factor that no step moves, and why."""
    zero = factors.keys() - movable_by_steps(factors).keys()
    return dict.fromkeys(modules_of(zero), "a factor of it is zero, and steps are relative to its size")


def modules_of(factors: Iterable[str]) -> list[str]:
    """The modules that factors belong to, by the model's names."""
    return sorted({name.partition(".lora_")[0].removeprefix(PREFIX) for name in factors})


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
