"""A plan of which everything arrives when PEFT loads the file: the installed PEFT itself is asked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from torch import nn

from peft_posthoc.adapters.arrivals import Arrivals, ask
from peft_posthoc.adapters.names import own_name
from peft_posthoc.adapters.portable_rules import Misread
from peft_posthoc.extraction.forms.layout import FileLayout
from peft_posthoc.extraction.plan import Plan
from peft_posthoc.extraction.reasons import LeftOut, Reason

_NOWHERE = {"base": None, "base_revision": None}


def arriving(
    plan: Plan,
    model: Callable[[], nn.Module | None],
    lay_out: Callable[[Plan], FileLayout],
    keep: Callable[[Plan, Mapping[str, LeftOut]], Plan] = lambda plan, _: plan,
) -> tuple[Plan, str]:
    """Lead every tensor of a plan's file to where PEFT loads it: under another name, or whole; or leave it out.

    Args:
        plan: What is carried as factors.
        model: Makes the model without values; None where its class is not known, and nothing is claimed.
        lay_out: Lays the file of a plan out.
        keep: Keeps what can be kept whole of what has no factors, but for these weights.

    Returns:
        The plan; and what PEFT raises, where it does not load the adapter whatever is left out.
    """
    left_out: dict[str, LeftOut] = {}
    while True:
        kept = keep(plan, left_out)
        try:
            file = lay_out(kept)
        except Misread as error:
            plan = _without(plan, [error.module], LeftOut(Reason.MISREAD, (error.module, error.other)))
            continue
        built = model()
        if built is None:
            return kept, ""
        found = ask(built, file.config(_NOWHERE), file.tensors)
        factors, whole = _lost(file, found)
        if not (factors or whole):
            return kept, found.error
        names = {module: name for module, name in _on_disk(plan).items() if module in factors - plan.called.keys()}
        plan = _without(plan, factors - names.keys(), LeftOut(Reason.DROPPED))
        left_out |= {
            weight: LeftOut(Reason.NOT_LOADED, (module,))
            for module in sorted(whole)
            for weight, how in kept.kept.items()
            if module in how.modules and not how.as_bias
        }
        plan = replace(plan, called={**plan.called, **names}, fates={**plan.fates, **left_out})


def _lost(file: FileLayout, found: Arrivals) -> tuple[set[str], set[str]]:
    """The modules that do not arrive: those with factors, and those that are whole."""
    if found.absent:
        return set(), _within(file.whole_modules, map(own_name, found.absent))
    if found.error:
        return set(), set(file.whole_modules) & set(found.refused)
    owners = file.of_factors
    factors = {module for name in found.lost for module in owners.get(name, ()) if module in file.slots}
    # Into the base itself is not where a module is kept whole.
    made = (
        name for name, arrived in found.parameters.items() if not any(".modules_to_save." in one for one in arrived)
    )
    return factors, _within(file.whole_modules, [own_name(name) for name in made if name not in owners])


def _within(modules: Iterable[str], names: Iterable[str]) -> set[str]:
    own = tuple(names)
    return {module for module in modules if any(name.startswith(f"{module}.") for name in own)}


def _on_disk(plan: Plan) -> dict[str, str]:
    """By module whose weight has another name on disk, that: what PEFT renames to the model's."""
    names = {plan.layout.module_of(weight): weight.removesuffix(".weight") for weight in plan.layout.renamed}
    return {module: name for module, name in names.items() if module != name}


def _without(plan: Plan, modules: Collection[str], why: LeftOut) -> Plan:
    """The plan without factors in these modules, nor zeros beside others'."""
    weights = [name for name, places in plan.carried.items() if any(place.module in modules for place in places)]
    slots = {module: slot for module, slot in plan.slots.items() if module not in modules}
    called = {module: name for module, name in plan.called.items() if module not in modules}
    return replace(plan, fates={**plan.fates, **dict.fromkeys(weights, why)}, slots=slots, called=called)
