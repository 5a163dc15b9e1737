"""Names of modules, as PEFT takes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from peft_posthoc.models.layout import GUESSED, Layout, ends

PREFIX = "base_model.model."
"""PEFT's beginning of every name in a file."""


def own_name(name: str) -> str:
    """The model's own name of a tensor in a file."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def patterns(ranks: Mapping[str, int], modules: Iterable[str]) -> dict[str, int]:
    """The ranks by regular expressions that PEFT finds at the end of a module's name, and of no other's in the file."""
    ambiguous = {end for module in modules for end in ends(module)[1:]}
    # Older versions of PEFT find none that begins with `^`.
    return {f"{'^' if module in ambiguous else ''}{re.escape(module)}": rank for module, rank in ranks.items()}


def target_modules(chosen: Iterable[str], layout: Layout) -> list[str]:
    """The shortest honest `target_modules`: leaf names where a leaf occurs nowhere else, full names otherwise."""
    modules = set(chosen)
    elsewhere = {module.rpartition(".")[2] for module in {*layout.classes, *layout.kinds} - modules}
    leaves = {module: module.rpartition(".")[2] for module in modules}
    if layout.origin == GUESSED:
        # A list of modules has some without weights, of which names tell nothing: `to_out.0` may lie beside a dropout.
        elsewhere |= {leaf for leaf in leaves.values() if leaf.isdigit()}
    return sorted({module if leaf in elsewhere else leaf for module, leaf in leaves.items()})


def matched(targets: Iterable[str], layout: Layout) -> set[str]:
    """The modules that PEFT takes `target_modules` to mean: a full name also means what ends in it."""
    names = set(targets)
    return {module for module in {*layout.classes, *layout.kinds} if not names.isdisjoint(ends(module))}
