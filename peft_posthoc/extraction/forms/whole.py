"""What has no LoRA form, and is kept as it is: norms, biases, convolutions, wherever PEFT can put them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace

from peft_posthoc.extraction.fate import Fate, Whole
from peft_posthoc.extraction.plan import Plan
from peft_posthoc.extraction.reasons import LeftOut, Reason
from peft_posthoc.models.kinds import EMBEDDING, LayerKind
from peft_posthoc.models.layout import Layout, Place
from peft_posthoc.models.part import is_rest


def keeping(plan: Plan, names: Collection[str]) -> Plan:
    """The same plan, which keeps these tensors where PEFT can: with the modules they live in, or as LoRA's bias.

    A module is kept with all that is in it (`modules_to_save`), so nothing in it may have factors or be missing. PEFT
    adapts no embedding where LoRA has biases (`lora_bias`): there embeddings are kept whole too. Where it adapts
    stacked experts, LoRA has no biases: layers with one are kept whole, and so is then what lies beside them.

    Args:
        plan: What is carried as factors.
        names: The tensors that may be kept: the tuned checkpoint has them.
    """
    layout = plan.layout
    names = [name for name in names if not _is_unread(name, plan)]
    biases = _biases(plan, names)
    whole = _better_whole(plan, names, biases)
    carried = {weight: places for weight, places in plan.carried.items() if weight not in whole}
    with_factors = {place.module for places in carried.values() for place in places}
    biases = {name: module for name, module in biases.items() if module in with_factors}
    kept = {weight: Whole(*_own(weight, layout), as_bias=False) for weight in whole}
    free = {name for name in set(names) - carried.keys() - biases.keys() if name in kept or _has_no_slot(name, plan)}
    # A stack of experts is nearly the model.
    experts = {stack.name.rpartition(".")[0] for stack in layout.stacks}
    blocked = _blocked(plan, free) | experts | {""}  # The model itself is no module that can be kept.
    for name in names:
        if name in biases:
            kept[name] = Whole((biases[name],), (layout.name_of(name),), as_bias=True)
        elif name in free and name not in kept:
            modules, own = _homes(name, layout, blocked)
            if modules:
                kept[name] = Whole(modules, own, as_bias=False)
    misread = _drop_misread(kept, layout)

    def fate_of(name: str, before: Fate) -> Fate:
        if name in kept:
            return kept[name]
        if name in misread:
            return misread[name]
        if isinstance(before, LeftOut) and before.reason is Reason.DROPPED:
            return LeftOut(Reason.NOT_LOADED, (layout.module_of(name),))
        if isinstance(before, LeftOut) and name in free:
            if "." not in name:
                return LeftOut(Reason.OF_THE_MODEL, (before.text,))
            if layout.module_of(name) in blocked:
                return LeftOut(Reason.BESIDE_FACTORS, (before.text,))
        return before

    return replace(plan, fates={name: fate_of(name, before) for name, before in plan.fates.items()})


def _has_no_slot(name: str, plan: Plan) -> bool:
    """Whether it could have no factors; what could have them and has none was not chosen."""
    other_rows = name in plan.left_out and plan.left_out[name].reason is Reason.OTHER_ROWS
    return other_rows or not any(place.module in plan.slots for place in plan.layout.places(name))


def _is_unread(name: str, plan: Plan) -> bool:
    return name in plan.left_out and plan.left_out[name].reason is Reason.UNREAD


def _homes(name: str, layout: Layout, blocked: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules to keep for a tensor, and its names in them: its own, and those that share it."""
    found = [(own.rpartition(".")[0], own) for own in layout.names_of(name)]
    homes = [(module, n) for module, n in found if module in layout.classes and module not in blocked]
    return tuple(module for module, _ in homes), tuple(n for _, n in homes)


def as_peft_means(
    modules: Collection[str], kept: Mapping[str, Whole], layout: Layout
) -> tuple[list[str], dict[str, str]]:
    """What PEFT keeps whole for these names: whatever ends in one of them.

    Of modules that lie in one another it is the outermost; PEFT would otherwise wrap one inside its own wrapper.

    Returns:
        The modules; and those that cannot be kept whole but would be, each with the name that means it.
    """
    possible = {module for how in kept.values() if not how.as_bias for module in how.modules}
    ends = tuple(modules)
    meant = {module for module in {*layout.classes, *layout.kinds} if module.endswith(ends)} if ends else set()
    inside = tuple(f"{module}." for module in meant)
    outer = {module for module in meant if not module.startswith(inside)}
    inner = {module for module in meant - outer if module.endswith(tuple(outer))}
    stuck = sorted((meant - possible) | inner)
    return sorted(outer), {module: min(end for end in ends if module.endswith(end)) for module in stuck}


def _drop_misread(kept: dict[str, Whole], layout: Layout) -> dict[str, LeftOut]:
    """Take out what cannot be kept since the name of its module means another one too; by weight, why."""
    dropped: dict[str, LeftOut] = {}
    while True:
        whole = {module for how in kept.values() if not how.as_bias for module in how.modules}
        _, stuck = as_peft_means(whole, kept, layout)
        if not stuck:
            return dropped
        module, end = next(iter(stuck.items()))
        for name in [name for name, how in kept.items() if not how.as_bias and end in how.modules]:
            del kept[name]
            dropped[name] = LeftOut(Reason.MISREAD, (end, module))


def _biases(plan: Plan, names: Collection[str]) -> dict[str, str]:
    """By bias, the module with factors that it belongs to."""
    layout = plan.layout
    with_factors = {place.module for places in plan.carried.values() for place in places if place.kind is not EMBEDDING}
    return {
        name: module
        for name in names
        if (module := layout.module_of(name)) in with_factors
        and layout.name_of(name) == f"{module}.bias"
        # One of another shape, such as a single number, is no bias of LoRA's.
        and plan.headers[name].shape == (plan.slots[module].m,)
    }


def _better_whole(plan: Plan, names: Collection[str], biases: Mapping[str, str]) -> set[str]:
    """The carried weights that are kept whole, since their factors would keep something else out."""
    stacked = any(place.kind.stacked for places in plan.carried.values() for place in places)
    with_bias = set(biases.values())
    loose = _modules_of_loose_parameters(plan, names)

    def better(place: Place) -> bool:
        if _yields(place.kind) and any(place.module.startswith(f"{module}.") for module in loose):
            return True  # ViT's patches beside its class token.
        return place.module in with_bias if stacked else bool(biases) and place.kind is EMBEDDING

    return {weight for weight, places in plan.carried.items() if any(map(better, places))}


def _yields(kind: LayerKind) -> bool:
    """Whether layers of this kind are small enough to be kept whole with what lies beside them."""
    return kind is EMBEDDING or bool(kind.kernel)


def _modules_of_loose_parameters(plan: Plan, names: Collection[str]) -> set[str]:
    """The modules with parameters of their own that hold no layers with factors but those that yield."""
    layout = plan.layout
    own = {layout.module_of(name) for name in names if name not in plan.carried}
    others = {
        module.rpartition(".")[0] for places in plan.carried.values() for module, kind, _ in places if not _yields(kind)
    }
    above = {".".join(parts[:depth]) for parts in (o.split(".") for o in others) for depth in range(1, len(parts) + 1)}
    return own - above


def _own(weight: str, layout: Layout) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = layout.names_of(weight)
    return tuple(name.rpartition(".")[0] for name in names), names


def _blocked(plan: Plan, free: Collection[str]) -> set[str]:
    """The modules that cannot be kept: something in them has factors, or is in one checkpoint only."""
    layout = plan.layout
    inside: dict[str, list[bool]] = defaultdict(list)
    for name in plan.headers:
        if is_rest(name) or _is_unread(name, plan):
            continue  # Rows beyond the base's vocabulary, and older buffers: the module itself has none of them.
        for own in layout.names_of(name):
            parts = own.split(".")
            for depth in range(1, len(parts)):
                inside[".".join(parts[:depth])].append(name in free)
    return {module for module, each in inside.items() if not all(each)}
