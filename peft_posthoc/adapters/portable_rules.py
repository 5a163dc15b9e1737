"""Rules for an adapter that every engine reads alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from peft_posthoc.adapters.names import matched, target_modules
from peft_posthoc.errors import AdapterError
from peft_posthoc.models.layout import Layout, is_of_an_expert
from peft_posthoc.models.slots import Slot
from peft_posthoc.text import asked

# Engines fuse these into one kernel and expect all of a group or none.
_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
)
_OF_AN_EXPERT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3"))


class Misread(AdapterError):
    """PEFT would take the name of a module that is adapted to mean another one too, which has no LoRA form."""

    def __init__(self, module: str, other: str) -> None:
        pattern = rf"^{re.escape(module)}\."
        super().__init__(
            f"PEFT would take `{module}`, which is adapted, to mean `{other}` too, which has no LoRA form. Leave the "
            f"first one out: `{asked('exclude', pattern)}`."
        )
        self.module, self.other = module, other


def targeted(chosen: Iterable[str], slots: Mapping[str, Slot], layout: Layout) -> list[str]:
    """The chosen modules, and those that PEFT takes their names to mean too.

    Raises:
        Misread: One of these has no LoRA form.
    """
    modules = set(chosen)
    while extra := matched(target_modules(modules, layout), layout) - modules:
        stuck = sorted(module for module in extra if module not in slots)
        if stuck:
            adapted = next((m for m in sorted(modules) if stuck[0] in matched([m], layout)), stuck[0])
            raise Misread(adapted, stuck[0])
        modules |= extra
    return [module for module in slots if module in modules]


def complete(carried: Iterable[str], slots: Mapping[str, Slot]) -> set[str]:
    """The carried modules, every other layer of the same name, and the members of the groups they belong to."""
    chosen = set(carried)
    by_pattern: dict[str, list[str]] = {}
    for module in slots:
        by_pattern.setdefault(_pattern(module), []).append(module)
    for module in list(chosen):
        stem, dot, leaf = module.rpartition(".")
        for group in (*_TOGETHER, *(_OF_AN_EXPERT if is_of_an_expert(module) else ())):
            if leaf in group:
                chosen |= {sibling for part in group if (sibling := f"{stem}{dot}{part}") in slots}
    for pattern in {_pattern(module) for module in chosen}:
        chosen.update(by_pattern.get(pattern, ()))
    return chosen


def _pattern(module: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module)
