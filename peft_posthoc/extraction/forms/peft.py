"""The `peft` form: everything that changed, as exactly as PEFT can hold it. Engines other than PEFT may refuse it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import cast, cast_biases
from peft_posthoc.adapters.config import adapter_config
from peft_posthoc.adapters.experts import target_parameters
from peft_posthoc.adapters.names import PREFIX, patterns, target_modules
from peft_posthoc.adapters.portable_rules import targeted
from peft_posthoc.errors import AdapterError, NothingToCarryError
from peft_posthoc.extraction.findings import Findings
from peft_posthoc.extraction.forms.portable import stacked_tensors, stacks_of
from peft_posthoc.extraction.forms.whole import as_peft_means, keeping
from peft_posthoc.extraction.plan import Plan
from peft_posthoc.models.kinds import EMBEDDING


class Exact:
    """How an adapter is laid out in its file, in the `peft` form.

    Every layer has its own rank (`rank_pattern`, with an equal `alpha_pattern`: the scale is one everywhere). Biases of
    layers with factors are LoRA's (`lora_bias`); norms and whatever else has no factors are there whole
    (`modules_to_save`), so that the base itself is not touched.
    """

    def rank(self, adapter: Findings) -> int:
        """The file's `r`: what most layers have; the others are in its `rank_pattern`.

        Stacked experts have it too, all padded to one rank: PEFT complains of patterns for parameters.
        """
        stacked = {unit for stack in stacks_of(adapter) for unit in stack.units}
        counts = Counter(len(a) for module, (a, _) in adapter.factors.items() if not stacked or module in stacked)
        if not counts:
            return 1
        return max(counts) if stacked else max(counts, key=lambda rank: (counts[rank], rank))

    def keep(self, plan: Plan, names: Collection[str]) -> Plan:
        """The plan with norms, biases and the like."""
        return keeping(plan, names)

    def tensors(self, adapter: Findings) -> dict[str, Tensor]:
        """The file's tensors: factors in the saved dtype, whole ones in their own.

        Raises:
            AdapterError: The dtype does not hold a factor.
        """
        biases = cast_biases(self._biases(adapter), adapter.dtype)
        tensors: dict[str, Tensor] = {}
        for module, rank in self._ranks(adapter).items():
            kind, m, n = adapter.plan.slots[module]
            a, b = adapter.factors.get(module, (torch.zeros(rank, n), torch.zeros(m, rank)))
            tensors |= kind.tensors(f"{PREFIX}{module}", *cast(a, b, adapter.dtype, module))
            if biases:
                bias = biases.get(module, torch.zeros(m, dtype=adapter.dtype))
                tensors[f"{PREFIX}{module}.lora_B.bias"] = bias
        for weight, names in self._names(adapter).items():
            tensors |= {f"{PREFIX}{name}": adapter.kept[weight].value.clone() for name in names}
        return tensors | stacked_tensors(adapter, self.rank(adapter))

    def bytes(self, adapter: Findings) -> dict[str, int]:
        """What each module takes in the file: its factors, and its bias where LoRA has biases."""
        slots, item, bias = adapter.plan.slots, adapter.dtype.itemsize, bool(self._biases(adapter))
        layers = {
            module: (rank * (slots[module].m + slots[module].n) + bias * slots[module].m) * item
            for module, rank in self._ranks(adapter).items()
        }
        rank = self.rank(adapter)
        return layers | {
            unit: rank * (slots[unit].m + slots[unit].n) * item for stack in stacks_of(adapter) for unit in stack.units
        }

    def padding(self, adapter: Findings) -> int:
        """None: every layer has its own rank."""
        del adapter
        return 0

    def whole(self, adapter: Findings) -> dict[str, int]:
        """By weight, what the tensors take in the file that are there whole."""
        kept = adapter.kept
        return {
            weight: len(names) * kept[weight].value.nbytes for weight, names in self._names(adapter).items() if names
        }

    def warnings(self, adapter: Findings) -> list[str]:
        """That it is for PEFT alone; and where PEFT cannot merge it."""
        found = ["The `peft` form is for PEFT alone: serving engines refuse or misread it (`--form portable`)."]
        stacks = stacks_of(adapter)
        whole = {weight for weight in adapter.kept if adapter.plan.layout.places(weight)}
        if stacks and (layers := [weight for weight in whole if adapter.kept[weight].delta_norm]):
            found.append(
                f"{len(layers)} layers are kept whole: beside stacked experts PEFT's LoRA has neither biases nor dense "
                "MLPs. To give layers with a bias factors, leave the biases out: `--exclude '\\.bias$'`."
            )
        if self._biases(adapter):
            layout = adapter.plan.layout
            owners = {layout.module_of(name) for name in adapter.plan.headers if layout.name_of(name).endswith(".bias")}
            if bare := [module for module in self._ranks(adapter) if module not in owners]:
                found.append(f"`{bare[0]}` has no bias, but LoRA's: PEFT's `merge_and_unload` refuses this adapter.")
        return found

    def config(self, adapter: Findings) -> dict[str, Any]:
        """The file's configuration."""
        layout, rank, ranks = adapter.plan.layout, self.rank(adapter), self._ranks(adapter)
        return adapter_config(
            rank,
            target_modules(ranks, layout),
            base=adapter.provenance["base"],
            revision=adapter.provenance["base_revision"],
            task_type=layout.task_type,
            fan_in_fan_out=layout.fan_in_fan_out,
            whole=self._whole(adapter),
            stacked=target_parameters(stacks_of(adapter)),
            ranks=patterns({module: own for module, own in ranks.items() if own != rank}, ranks),
            lora_bias=bool(self._biases(adapter)),
        )

    def _ranks(self, adapter: Findings) -> dict[str, int]:
        """By module in the file, its rank: 1, of zeros, where only its bias changed or PEFT takes it along."""
        factors = adapter.factors
        plain = {module for module in factors if not adapter.plan.slots[module].kind.stacked}
        chosen = {*plain, *(module for module, bias in self._biases(adapter).items() if bias.any())}
        if not chosen and not stacks_of(adapter):
            chosen = self._carrier(adapter)
        return {
            module: len(factors[module][0]) if module in factors else 1
            for module in targeted(chosen, adapter.plan.slots, adapter.plan.layout)
        }

    def _carrier(self, adapter: Findings) -> set[str]:
        """A layer for zeros where no layer has changed: PEFT takes no adapter without one.

        Raises:
            NothingToCarryError: There is none.
        """
        whole = tuple(f"{module}." for module in self._whole(adapter))
        for module, slot in adapter.plan.slots.items():
            free = not slot.kind.stacked and slot.kind is not EMBEDDING and not f"{module}.".startswith(whole)
            if free and targeted([module], adapter.plan.slots, adapter.plan.layout) == [module]:
                return {module}
        raise NothingToCarryError("Norms or biases alone have changed, and PEFT needs a layer beside them to adapt.")

    def _biases(self, adapter: Findings) -> dict[str, Tensor]:
        """By module with factors, the difference of its bias; nothing if no bias has changed."""
        plan = adapter.plan
        found = {
            module: kept.value
            for name, kept in adapter.kept.items()
            if plan.kept[name].as_bias
            for module in plan.kept[name].modules
        }
        return found if any(value.any() for value in found.values()) else {}

    def _whole(self, adapter: Findings) -> list[str]:
        """The modules that are in the file whole: those of which something has changed."""
        plan = adapter.plan
        changed = {
            module
            for name, kept in adapter.kept.items()
            if kept.delta_norm and not plan.kept[name].as_bias
            for module in plan.kept[name].modules
        }
        whole, stuck = as_peft_means(changed, plan.kept, plan.layout)
        if stuck:
            module, end = next(iter(stuck.items()))
            weight = next(weight for weight, kept in plan.kept.items() if end in kept.modules)
            pattern = rf"^{re.escape(weight.rpartition('.')[0])}\."
            raise AdapterError(
                f"PEFT would take `{end}`, which is to be kept whole, to mean `{module}` too, which cannot be. Leave "
                f"it out: `--exclude '{pattern}'`."
            )
        return whole

    def _names(self, adapter: Findings) -> dict[str, list[str]]:
        """By weight that is kept, its names in the modules that are in the file whole."""
        inside = tuple(f"{module}." for module in self._whole(adapter))
        kept = {weight: how for weight, how in adapter.plan.kept.items() if not how.as_bias}
        return {weight: [name for name in how.names if name.startswith(inside)] for weight, how in kept.items()}


EXACT = Exact()
