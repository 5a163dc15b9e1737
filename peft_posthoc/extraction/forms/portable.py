"""The portable form: an adapter that computes the same in PEFT, vLLM, SGLang, LoRAX, TGI, TensorRT-LLM and llama.cpp.

One rank for the whole file and `lora_alpha` equal to it make the scale exactly one by every engine's formula; only
`lora_A` and `lora_B` tensors are in it, and only configuration keys that PEFT has known since 0.6.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import cast
from peft_posthoc.adapters.config import adapter_config
from peft_posthoc.adapters.experts import pack, places_in_file, target_parameters, targeted_stacks
from peft_posthoc.adapters.names import PREFIX, target_modules
from peft_posthoc.adapters.portable_rules import complete, targeted
from peft_posthoc.extraction.findings import Findings
from peft_posthoc.extraction.plan import Plan
from peft_posthoc.models.kinds import LINEAR
from peft_posthoc.models.layout import Stack, is_of_an_expert
from peft_posthoc.ranks.safe import safe_rank


class Portable:
    """How an adapter is laid out in its file, in the portable form."""

    def rank(self, adapter: Findings) -> int:
        """The one rank of the file, to which every layer is padded with zeros."""
        return safe_rank(adapter.rank)

    def modules(self, adapter: Findings) -> list[str]:
        """Every module in the file: those with factors, and those that must be there as zeros beside them.

        Raises:
            AdapterError: PEFT cannot be told to adapt these modules without others that have no LoRA form.
        """
        plan = adapter.plan
        return targeted(complete(_plain(adapter), plan.slots), plan.slots, plan.layout)

    def tensors(self, adapter: Findings) -> dict[str, Tensor]:
        """The file's tensors, padded to one rank, in the saved dtype, on the CPU.

        Raises:
            AdapterError: The dtype does not hold a factor.
        """
        rank, dtype = self.rank(adapter), adapter.dtype
        tensors: dict[str, Tensor] = {}
        for module in self.modules(adapter):
            kind, m, n = adapter.plan.slots[module]
            if module in adapter.factors:
                a, b = cast(*adapter.factors[module], dtype, module, rank=rank)
            else:
                a, b = torch.zeros(rank, n, dtype=dtype), torch.zeros(m, rank, dtype=dtype)
            tensors |= kind.tensors(f"{PREFIX}{module}", a, b)
        return tensors | stacked_tensors(adapter, rank)

    def bytes(self, adapter: Findings) -> dict[str, int]:
        """What each module takes in the file."""
        rank, item = self.rank(adapter), adapter.dtype.itemsize
        stacked = (unit for stack in stacks_of(adapter) for unit in stack.units)
        slots = {module: adapter.plan.slots[module] for module in [*self.modules(adapter), *stacked]}
        return {module: rank * (m + n) * item for module, (_, m, n) in slots.items()}

    def padding(self, adapter: Findings) -> int:
        """Zeros, which bring every layer to the one rank."""
        slots, item = adapter.plan.slots, adapter.dtype.itemsize
        own = {module: len(a) * sum(slots[module][1:]) * item for module, (a, _) in adapter.factors.items()}
        return sum(count - own.get(module, 0) for module, count in self.bytes(adapter).items())

    def whole(self, adapter: Findings) -> dict[str, int]:
        """Nothing."""
        del adapter
        return {}

    def keep(self, plan: Plan, names: Collection[str]) -> Plan:
        """The plan itself: loaders refuse, ignore, or write over the base whatever is no factor."""
        del names
        return plan

    def warnings(self, adapter: Findings) -> list[str]:
        """Where it cannot be for all."""
        layout = adapter.plan.layout
        if stacks_of(adapter):
            return ["Stacked experts (`target_parameters`) need PEFT 0.19, and an engine that takes them so."]
        if layout.stacks and any(map(is_of_an_expert, adapter.factors)):
            lost = "the dense MLPs beside the experts" if layout.mistaken else "the experts"
            if layout.mistaken or not layout.peft_takes_experts:
                return [
                    f"For serving engines only: PEFT on transformers 5 drops the factors of {lost}, in silence. For "
                    "PEFT, `--form peft`."
                ]
        return []

    def config(self, adapter: Findings) -> dict[str, Any]:
        """The file's configuration."""
        layout = adapter.plan.layout
        return adapter_config(
            self.rank(adapter),
            target_modules(self.modules(adapter), layout),
            base=adapter.provenance["base"],
            revision=adapter.provenance["base_revision"],
            task_type=layout.task_type,
            fan_in_fan_out=layout.fan_in_fan_out,
            stacked=target_parameters(stacks_of(adapter)),
        )


PORTABLE = Portable()


def _plain(adapter: Findings) -> list[str]:
    """The modules with factors, without the stacked parameters."""
    return [module for module in adapter.factors if not adapter.plan.slots[module].kind.stacked]


def stacks_of(adapter: Findings) -> list[Stack]:
    """The stacked experts in the file."""
    return targeted_stacks(adapter.factors, adapter.plan.layout)


def stacked_tensors(adapter: Findings, rank: int) -> dict[str, Tensor]:
    """The file's tensors of the stacked experts, all padded to this rank.

    Raises:
        AdapterError: The dtype does not hold a factor.
    """
    stacks = stacks_of(adapter)
    places = places_in_file(stacks)
    tensors: dict[str, Tensor] = {}
    for stack in stacks:
        packed = pack(stack, adapter.factors, rank, adapter.dtype)
        tensors |= LINEAR.tensors(f"{PREFIX}{places[stack.name]}", *packed)
    return tensors
