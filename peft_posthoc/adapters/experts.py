"""How PEFT stores the factors of stacked experts (`target_parameters`, PEFT 0.19 and newer).

`lora_A.weight` is (experts times r) x n, row `expert * r + k`; `lora_B.weight` is m x (r times experts), column
`k * experts + expert`. Several parameters of one module wrap one another: the first one is innermost.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import cast
from peft_posthoc.models.layout import Layout, Stack

Pair = tuple[Tensor, Tensor]
"""`a` (r x n) and `b` (m x r)."""


def targeted_stacks(modules: Collection[str], layout: Layout) -> list[Stack]:
    """The stacks of which some matrix is among the modules, and all that PEFT means by their names."""
    names = {_suffix(stack) for stack in layout.stacks if not set(stack.units).isdisjoint(modules)}
    return [stack for stack in layout.stacks if _suffix(stack) in names]


def target_parameters(stacks: Iterable[Stack]) -> list[str]:
    """PEFT's names for stacks."""
    return sorted({_suffix(stack) for stack in stacks})


def _suffix(stack: Stack) -> str:
    """The end of its name that it has in every layer."""
    return re.split(r"\.\d+\.", stack.name)[-1]


def places_in_file(stacks: Iterable[Stack]) -> dict[str, str]:
    """The module that holds each stack's factors in the file."""
    by_module: dict[str, list[str]] = {}
    for stack in stacks:
        by_module.setdefault(stack.name.rpartition(".")[0], []).append(stack.name)
    return {
        name: module + ".base_layer" * (len(names) - 1 - index)
        for module, names in by_module.items()
        for index, name in enumerate(names)
    }


def pack(stack: Stack, factors: Mapping[str, Pair], rank: int, dtype: torch.dtype) -> Pair:
    """The factors of all its matrices as PEFT stores them, padded with zeros to one rank.

    Raises:
        AdapterError: The dtype does not hold a factor.
    """
    units = stack.units
    m, n = stack.kind.size(stack.shape[-2:]) or (0, 0)
    a, b = torch.zeros(len(units), rank, n, dtype=dtype), torch.zeros(m, rank, len(units), dtype=dtype)
    for index, unit in enumerate(units):
        if unit in factors:
            a[index], b[:, :, index] = cast(*factors[unit], dtype, unit, rank=rank)
    return a.flatten(0, 1), b.flatten(1)
