"""Rules about `target_modules`, and about modules that belong together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from itertools import islice

from peft_posthoc.adapters.config import in_layers_named, meant
from peft_posthoc.serving.rules.rule import BOTH_READ, FIX, FIX_BASE, REFUSED, SGLANG_RUN, WARNING, WRONG, Rule
from peft_posthoc.serving.rules.scale import ranked
from peft_posthoc.serving.subject import Subject, leaf_of

_NUMBER = re.compile(r"(?<![^.])\d{1,18}(?![^.])")
# Layers that are told as missing.
_MOST = 10_000
# How SGLang 0.5.23 calls what it fuses (`srt/lora/utils.py`, `get_normalized_target_modules`).
_SGLANG_NAMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}


def target_pattern(subject: Subject) -> tuple[str, ...]:
    """`target_modules`, where it is a regular expression."""
    target = subject.config.get("target_modules")
    return (target,) if isinstance(target, str) and target not in ("all", "all-linear") else ()


def untargeted(subject: Subject) -> tuple[str, ...]:
    """Modules whose name is in no target, as SGLang compares them."""
    target = subject.config.get("target_modules")
    if not isinstance(target, list):
        return ()

    def name(module: str) -> str:
        return _SGLANG_NAMES.get(leaf_of(module), leaf_of(module))

    names = {name(str(one)) for one in target}
    return tuple(module for module, _ in ranked(subject) if name(module) not in names)


def untargeted_in_peft(subject: Subject) -> tuple[str, ...]:
    """Modules that PEFT does not take `target_modules` to mean."""
    target = subject.config.get("target_modules")
    if target is None:
        return () if subject.fused_experts else ("target_modules=None",)
    modules = [module for module, _ in ranked(subject)]
    # To PEFT, "all-linear" is all but the head.
    spared = {*subject.heads, *subject.embeddings} if target == "all-linear" else set()
    taken = set(modules) if target == "all-linear" else meant(subject.config, "target_modules", modules, subject.label)
    taken &= in_layers_named(subject.config, modules, subject.label)
    taken -= {*spared, *meant(subject.config, "exclude_modules", modules, subject.label)}
    return tuple(module for module in modules if module not in taken)


def alone(subject: Subject, leaf: str, *, without: str, unless: Collection[str] = ()) -> tuple[str, ...]:
    """Modules called `leaf` that have no sibling called `without`, nor one of `unless`."""
    return tuple(
        module
        for module in subject.modules
        if leaf_of(module) == leaf
        and not any(f"{module.removesuffix(leaf)}{other}" in subject.modules for other in (without, *unless))
    )


def missing_layers(subject: Subject) -> tuple[str, ...]:
    """Layers that lack a name which others have.

    The base's class tells which layers there are; without it, the numbers in the file do.
    """
    of_experts = {*subject.experts, *subject.fused_experts}
    patterns = {_pattern(module) for module in subject.modules if module not in of_experts}
    if subject.base is not None:
        there = subject.base.layout.classes
        return tuple(module for module in there if _pattern(module) in patterns and module not in subject.modules)
    if subject.config.get("layers_to_transform") is not None:
        return (f"layers_to_transform={subject.config['layers_to_transform']}",)
    numbers: dict[str, set[int]] = defaultdict(set)
    last: dict[str, int] = defaultdict(int)
    for module in subject.modules:
        if (pattern := _pattern(module)) in patterns and (number := _NUMBER.search(module)):
            numbers[pattern].add(int(number[0]))
            stack = module[: number.start()]
            last[stack] = max(last[stack], int(number[0]))
    missing = (
        pattern.replace("*", str(index), 1)
        for pattern, held in numbers.items()
        for index in range(last[pattern[: pattern.index("*")]] + 1)
        if index not in held
    )
    # A name may say any number.
    return tuple(islice(missing, _MOST))


def _pattern(module: str) -> str:
    return _NUMBER.sub("*", module)


RULES: tuple[Rule, ...] = (
    Rule(
        name="target-pattern",
        engines=("sglang",),
        severity=REFUSED,
        finds=target_pattern,
        message='`target_modules` must be a list, "all" or "all-linear"',
        way_out=FIX,
        source=f"{SGLANG_RUN} (srt/lora/utils.py)",
    ),
    Rule(
        name="target-all-linear",
        engines=("sglang",),
        severity=WARNING,
        finds=lambda s: ("target_modules='all-linear'",) if s.config.get("target_modules") == "all-linear" else (),
        message="needs `--lora-target-modules`, or finds them out by itself in newer versions",
        way_out=FIX,
        source="read: srt/lora/utils.py",
    ),
    Rule(
        name="untargeted",
        engines=("sglang",),
        severity=REFUSED,
        finds=untargeted,
        message="finds no target for these modules of the file",
        way_out=FIX,
        source=f"{SGLANG_RUN} (srt/lora/utils.py)",
    ),
    Rule(
        name="untargeted-in-peft",
        engines=("peft",),
        severity=WRONG,
        finds=untargeted_in_peft,
        message="drops factors of modules that `target_modules` does not mean, with a warning at most",
        way_out=FIX,
        source="run",
    ),
    Rule(
        name="q-without-v",
        engines=("sglang",),
        severity=REFUSED,
        finds=lambda s: alone(s, "q_proj", without="v_proj", unless=("kv_b_proj", "kv_a_proj_with_mqa")),
        message="fuses q, k and v and needs v beside q (KeyError)",
        way_out=FIX_BASE,
        source=f"{SGLANG_RUN} (`normalize_qkv_proj`)",
    ),
    Rule(
        name="up-without-gate",
        engines=("sglang",),
        severity=REFUSED,
        finds=lambda s: alone(s, "up_proj", without="gate_proj"),
        message="fuses gate and up and needs gate beside up, but for models that have up alone",
        way_out=FIX_BASE,
        source=f"{SGLANG_RUN} (`normalize_gate_up_proj`)",
    ),
    Rule(
        name="missing-layers",
        engines=("lorax", "tgi"),
        severity=WRONG,
        finds=missing_layers,
        message="ignores a projection in all layers where one layer lacks it",
        way_out=FIX_BASE,
        source=f"{BOTH_READ} (`prepare_weights` gives None)",
    ),
)
