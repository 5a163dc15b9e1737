"""The `peft` form: everything that changed, as exactly as PEFT can hold it. Engines other than PEFT may refuse it.

Every layer has its own rank (`rank_pattern`, with an equal `alpha_pattern`: the scale is one everywhere). Biases of
layers with factors are LoRA's (`lora_bias`); norms and whatever else has no factors are there whole
(`modules_to_save`), so that the base itself is not touched.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch

from peft_posthoc.adapters.experts import targeted_stacks
from peft_posthoc.adapters.portable_rules import targeted
from peft_posthoc.errors import AdapterError, NothingToCarryError
from peft_posthoc.extraction.forms.layout import FileLayout
from peft_posthoc.extraction.forms.whole import as_peft_means
from peft_posthoc.extraction.plan import Plan
from peft_posthoc.models.kinds import EMBEDDING
from peft_posthoc.text import as_flag, asked, counted


def peft(plan: Plan, ranks: Mapping[str, int], changed: Collection[str], dtype: torch.dtype) -> FileLayout:
    """The layout of a file in which every layer has its own rank.

    Args:
        plan: What is carried, and what is kept whole.
        ranks: By module with factors.
        changed: The weights without factors that differ from the base's.
        dtype: Of the factors.

    Raises:
        AdapterError: PEFT would take the name of a module to mean another one too.
        NothingToCarryError: No layer is there for PEFT to adapt beside what is whole.
    """
    layout = plan.layout
    stacks = tuple(targeted_stacks(ranks, layout))
    owners = {module: name for name, how in plan.kept.items() if how.as_bias for module in how.modules}
    biases = owners if any(name in changed for name in owners.values()) else None
    whole = _whole_modules(plan, changed)
    chosen = {module for module in ranks if not plan.slots[module].kind.stacked}
    chosen |= {module for module, name in owners.items() if name in changed}
    if not chosen and not stacks:
        chosen = _carrier(plan, whole)
    # Of rank 1, and zeros: a layer of which only the bias changed, or that PEFT takes along.
    own = {module: ranks.get(module, 1) for module in targeted(chosen, plan.slots, layout)}
    inside = tuple(f"{module}." for module in whole)
    kept = {name: how for name, how in plan.kept.items() if not how.as_bias}
    return FileLayout(
        form="peft",
        rank=_rank(ranks, {unit for stack in stacks for unit in stack.units}),
        ranks=own,
        stacks=stacks,
        slots=plan.slots,
        model=layout,
        dtype=dtype,
        called=plan.called,
        biases=biases,
        whole_modules=tuple(whole),
        whole={name: tuple(one for one in how.names if one.startswith(inside)) for name, how in kept.items()},
        headers=plan.headers,
        warnings=(
            "The `peft` form is for PEFT alone: serving engines refuse or misread it "
            f"(`{as_flag('form', 'portable')}`).",
            *_kept_whole(plan, changed, stacked=bool(stacks)),
            *(_no_bias(plan, own) if biases is not None else ()),
        ),
    )


def _rank(ranks: Mapping[str, int], stacked: Collection[str]) -> int:
    """The file's `r`: what most layers have; the others are in its `rank_pattern`.

    Stacked experts have it too, all padded to one rank: PEFT complains of patterns for parameters.
    """
    counts = Counter(rank for module, rank in ranks.items() if not stacked or module in stacked)
    if not counts:
        return 1
    return max(counts) if stacked else max(counts, key=lambda rank: (counts[rank], rank))


def _carrier(plan: Plan, whole: Sequence[str]) -> set[str]:
    """A layer for zeros where no layer has changed: PEFT takes no adapter without one.

    Raises:
        NothingToCarryError: There is none.
    """
    inside = tuple(f"{module}." for module in whole)
    for module, slot in plan.slots.items():
        free = not slot.kind.stacked and slot.kind is not EMBEDDING and not f"{module}.".startswith(inside)
        if free and targeted([module], plan.slots, plan.layout) == [module]:
            return {module}
    raise NothingToCarryError("Norms or biases alone have changed, and PEFT needs a layer beside them to adapt.")


def _whole_modules(plan: Plan, changed: Collection[str]) -> list[str]:
    """The modules that are in the file whole: those of which something has changed.

    Raises:
        AdapterError: PEFT would take one's name to mean another one too.
    """
    kept = {name: how for name, how in plan.kept.items() if not how.as_bias}
    modules = {module for name, how in kept.items() if name in changed for module in how.modules}
    whole, stuck = as_peft_means(modules, plan.kept, plan.layout)
    if stuck:
        module, end = next(iter(stuck.items()))
        weight = next(weight for weight, how in plan.kept.items() if end in how.modules)
        pattern = rf"^{re.escape(weight.rpartition('.')[0])}\."
        raise AdapterError(
            f"PEFT would take `{end}`, which is to be kept whole, to mean `{module}` too, which cannot be. Leave it "
            f"out: `{asked('exclude', pattern)}`."
        )
    return whole


def _kept_whole(plan: Plan, changed: Collection[str], *, stacked: bool) -> list[str]:
    """The warning of layers that stacked experts keep from having factors."""
    layers = [name for name in plan.kept if name in changed and plan.layout.places(name)] if stacked else []
    if not layers:
        return []
    pattern = r"\.bias$"
    number = counted(len(layers), "layer is", "layers are")
    return [
        f"{number} kept whole: beside stacked experts PEFT's LoRA has neither biases nor dense MLPs. "
        f"To give layers with a bias factors, leave the biases out: `{as_flag('exclude', pattern)}`."
    ]


def _no_bias(plan: Plan, modules: Collection[str]) -> list[str]:
    """The warning of layers that have a bias in the file alone."""
    layout = plan.layout
    owners = {layout.module_of(name) for name in plan.headers if layout.name_of(name).endswith(".bias")}
    bare = [module for module in modules if module not in owners]
    return [f"`{bare[0]}` has no bias, but LoRA's: PEFT's `merge_and_unload` refuses this adapter."] if bare else []
