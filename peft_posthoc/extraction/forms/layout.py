"""The layout of an adapter's file: what is in it and how large it is, from headers, ranks and which weights changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import cast, cast_biases
from peft_posthoc.adapters.config import adapter_config
from peft_posthoc.adapters.experts import Pair, pack, places_in_file, target_parameters
from peft_posthoc.adapters.names import PREFIX, patterns, target_modules
from peft_posthoc.adapters.writer import metadata
from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.file_header import header_bytes
from peft_posthoc.models.kinds import LINEAR
from peft_posthoc.models.layout import Layout, Stack
from peft_posthoc.models.slots import Slot

Form = Literal["portable", "peft"]
"""How an adapter is laid out in its file: as every engine loads it, or as exactly as PEFT can hold it."""


@dataclass(frozen=True)
class FileLayout:
    """What is in an adapter's file, without the numbers."""

    form: Form
    rank: int
    """`r` of the file's configuration; of stacked experts and, in the portable form, of every module."""
    ranks: Mapping[str, int]
    """By module with factors, in the model's order: its rank in the file. Stacked experts are not among them."""
    stacks: tuple[Stack, ...]
    """Stacked experts with factors."""
    slots: Mapping[str, Slot]
    """Of these modules, and of the matrices of stacked experts: kind and sides."""
    model: Layout
    dtype: torch.dtype
    """Of factors and biases."""
    called: Mapping[str, str] = field(default_factory=dict)
    """By module with factors, what it is called in the file, where PEFT renames what it loads."""
    padding: int = 0
    """Bytes of zeros: what the file takes beyond every layer at its own rank."""
    biases: Mapping[str, str] | None = None
    """By module with factors, the weight that is its bias; None where the file has no biases beside factors."""
    whole_modules: tuple[str, ...] = ()
    """Modules that are in the file whole."""
    whole: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By weight, its names in these modules."""
    headers: Mapping[str, Header] = field(default_factory=dict)
    """Of these weights."""
    warnings: tuple[str, ...] = ()
    """What a user of such a file should know."""

    @property
    def target_modules(self) -> list[str]:
        """What PEFT is told to adapt."""
        return target_modules(self.ranks, self.model)

    @property
    def units(self) -> list[str]:
        """The matrices of stacked experts with factors."""
        return [unit for stack in self.stacks for unit in stack.units]

    @cached_property
    def tensors(self) -> dict[str, Header]:
        """Shape and type of every tensor in the file."""
        found: dict[str, Header] = {}
        for module, rank in self.ranks.items():
            kind, m, n = self.slots[module]
            shapes = kind.shapes(self._key(module), rank, m, n)
            found |= {name: Header(shape, self.dtype) for name, shape in shapes.items()}
            if self.biases is not None:
                found[self._bias(module)] = Header((m,), self.dtype)
        for weight, names in self.whole.items():
            found |= {f"{PREFIX}{name}": self.headers[weight] for name in names}
        for stack, place in self._stacks_by_place:
            count, (_, m, n) = len(stack.units), self.slots[stack.units[0]]
            shapes = {"a": (count * self.rank, n), "b": (m, self.rank * count)}
            names = (f"{PREFIX}{place}.{LINEAR.a_key}", f"{PREFIX}{place}.{LINEAR.b_key}")
            found |= {name: Header(shape, self.dtype) for name, shape in zip(names, shapes.values(), strict=True)}
        return found

    @property
    def of_factors(self) -> dict[str, tuple[str, ...]]:
        """By tensor with factors, the modules, or the matrices of stacked experts, that they are of."""
        found: dict[str, tuple[str, ...]] = {}
        for module in self.ranks:
            names = [*self.slots[module].kind.shapes(self._key(module), 1, 1, 1), self._bias(module)]
            found |= {name: (module,) for name in names if name in self.tensors}
        for stack, place in self._stacks_by_place:
            found |= {f"{PREFIX}{place}.{key}": stack.units for key in (LINEAR.a_key, LINEAR.b_key)}
        return found

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(header.bytes for header in self.tensors.values())

    @property
    def numbers(self) -> int:
        """In all tensors."""
        return sum(math.prod(header.shape) for header in self.tensors.values())

    @cached_property
    def bytes_by_module(self) -> dict[str, int]:
        """What each module with factors takes: these, and its bias where LoRA has biases."""
        item, bias = self.dtype.itemsize, self.biases is not None
        ranks = {**self.ranks, **dict.fromkeys(self.units, self.rank)}
        sides = {module: (self.slots[module].m, self.slots[module].n) for module in ranks}
        return {
            module: (rank * sum(sides[module]) + (bias and module in self.ranks) * sides[module][0]) * item
            for module, rank in ranks.items()
        }

    @cached_property
    def bytes_of_whole(self) -> dict[str, int]:
        """By weight that is in the file without factors, what it takes."""
        return {weight: len(names) * self.headers[weight].bytes for weight, names in self.whole.items() if names}

    def header_bytes(self, provenance: Mapping[str, Any]) -> int:
        """Of what the file has before its numbers."""
        return header_bytes(self.tensors, metadata(provenance))

    def config(self, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration beside the file."""
        of_peft = self.form == "peft"
        # Under both names: PEFT knows a module by the model's, and what is in the file is read by the file's.
        ranks = {**self.ranks, **{self.called[name]: rank for name, rank in self.ranks.items() if name in self.called}}
        own = {module: rank for module, rank in ranks.items() if rank != self.rank}
        return adapter_config(
            self.rank,
            self.target_modules,
            base=provenance.get("for_base", provenance["base"]),
            revision=provenance.get("for_base_revision", provenance["base_revision"]),
            task_type=self.model.task_type,
            auto_mapping=self.model.auto_mapping,
            fan_in_fan_out=self.model.fan_in_fan_out,
            whole=self.whole_modules,
            stacked=target_parameters(self.stacks),
            ranks=patterns(own, ranks) if of_peft else None,
            lora_bias=self.biases is not None if of_peft else None,
        )

    def filled(self, factors: Mapping[str, Pair], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors, on the CPU: factors in the file's type, whole tensors in their own.

        Args:
            factors: By module, at most at its rank in the file; the others are zeros.
            values: By weight, whole tensors and differences of biases.

        Raises:
            AdapterError: The type does not hold a factor.
        """
        biases = cast_biases({module: values[weight] for module, weight in (self.biases or {}).items()}, self.dtype)
        tensors: dict[str, Tensor] = {}
        for module, rank in self.ranks.items():
            kind, m, n = self.slots[module]
            if module in factors:
                a, b = cast(*factors[module], self.dtype, module, rank=rank)
            else:
                a, b = torch.zeros(rank, n, dtype=self.dtype), torch.zeros(m, rank, dtype=self.dtype)
            tensors |= kind.tensors(self._key(module), a, b)
            if self.biases is not None:
                tensors[self._bias(module)] = biases.get(module, torch.zeros(m, dtype=self.dtype))
        for weight, names in self.whole.items():
            tensors |= {f"{PREFIX}{name}": values[weight].clone() for name in names}
        for stack, place in self._stacks_by_place:
            tensors |= LINEAR.tensors(f"{PREFIX}{place}", *pack(stack, factors, self.rank, self.dtype))
        return tensors

    def _key(self, module: str) -> str:
        return f"{PREFIX}{self.called.get(module, module)}"

    def _bias(self, module: str) -> str:
        return f"{self._key(module)}.lora_B.bias"

    @property
    def _stacks_by_place(self) -> list[tuple[Stack, str]]:
        """Stacked experts, each with the module that holds them in the file."""
        places = places_in_file(self.stacks)
        return [(stack, places[stack.name]) for stack in self.stacks]
