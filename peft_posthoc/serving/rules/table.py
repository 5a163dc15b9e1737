"""All rules, in the order in which they are told (docs/serving.md, `phlora check`)."""

from __future__ import annotations

from peft_posthoc.serving.rules import (
    adapter_files,
    arrivals,
    base,
    experts,
    modules,
    names,
    quantised,
    scale,
    targets,
    variants,
    whole,
)
from peft_posthoc.serving.rules.rule import Rule

RULES: tuple[Rule, ...] = (
    *base.RULES,
    *quantised.RULES,
    *adapter_files.RULES,
    *scale.RULES,
    *variants.RULES,
    *whole.RULES,
    *targets.RULES,
    *names.RULES,
    *arrivals.RULES,
    *modules.RULES,
    *experts.RULES,
)
