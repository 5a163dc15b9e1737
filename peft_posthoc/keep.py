"""What has no LoRA form, and is kept as it is: norms, biases, convolutions, wherever PEFT can put them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace

from peft_posthoc.layout import EMBEDDING, Layout
from peft_posthoc.plan import Keep, Plan


def keeping(plan: Plan, names: Collection[str]) -> Plan:
    """The same plan, which keeps these tensors where PEFT can: with the modules they live in, or as LoRA's bias.

    A module is kept with all that is in it (`modules_to_save`), so nothing in it may have factors or be missing. PEFT
    adapts no embedding where LoRA has biases (`lora_bias`): there embeddings are kept whole too.

    Args:
        plan: What is carried as factors.
        names: The tensors that may be kept: both checkpoints have them.
    """
    layout = plan.layout
    modules_with_factors = {
        place.module for places in plan.carried.values() for place in places if place.kind is not EMBEDDING
    }
    biases = {
        name: module
        for name in names
        if (module := layout.module_of(name)) in modules_with_factors and layout.name_of(name) == f"{module}.bias"
    }
    carried = dict(plan.carried)
    kept: dict[str, Keep] = {}
    if biases:
        for weight, places in plan.carried.items():
            if any(place.kind is EMBEDDING for place in places):
                modules = tuple(place.module for place in carried.pop(weight))
                kept[weight] = Keep(modules, tuple(f"{module}.weight" for module in modules), as_bias=False)
    # What could have factors and has none was not chosen.
    free = {
        name
        for name in set(names) - carried.keys() - biases.keys()
        if name in kept or not any(place.module in plan.slots for place in layout.places(name))
    }
    # A stack of experts is nearly the model.
    experts = {module for module, cls in layout.classes.items() if "Experts" in cls}
    blocked = _blocked(plan, free) | experts
    for name in names:
        if name in biases:
            kept[name] = Keep((biases[name],), (layout.name_of(name),), as_bias=True)
        elif name in free and name not in kept:
            modules, own = _homes(name, layout, blocked)
            if modules:
                kept[name] = Keep(modules, own, as_bias=False)
    left_out = {}
    for name, reason in plan.left_out.items():
        if name not in kept:
            module = layout.module_of(name)
            if module in experts:
                reason = "experts (not carried yet)"
            elif module in blocked and name in free:
                reason = f"a parameter of a module that holds layers with factors ({reason})"
            left_out[name] = reason
    return replace(plan, carried=carried, kept=kept, left_out=left_out)


def _homes(name: str, layout: Layout, blocked: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules to keep for a tensor, and its names in them: its own, and those that share it."""
    found = [(own.rpartition(".")[0], own) for own in layout.names_of(name)]
    homes = [(module, n) for module, n in found if module in layout.classes and module not in blocked]
    return tuple(module for module, _ in homes), tuple(n for _, n in homes)


def _blocked(plan: Plan, free: Collection[str]) -> set[str]:
    """The modules that cannot be kept: something in them has factors, or is in one checkpoint only."""
    layout = plan.layout
    inside: dict[str, list[bool]] = defaultdict(list)
    for name in plan.headers:
        parts = layout.module_of(name).split(".")
        for depth in range(1, len(parts) + 1):
            inside[".".join(parts[:depth])].append(name in free)
    return {module for module, each in inside.items() if not all(each)}
