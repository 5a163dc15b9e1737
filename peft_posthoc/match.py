"""Two checkpoints of one model brought under the same names and into the same pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from peft_posthoc.checkpoint import Checkpoint
from peft_posthoc.experts import Experts, see_experts
from peft_posthoc.layout import Layout, layout_of
from peft_posthoc.names import as_named, by_rules


class Match(NamedTuple):
    """Base and tuned as they are compared."""

    base: Checkpoint
    tuned: Checkpoint
    layout: Layout
    notes: tuple[str, ...]
    """What was decided on the way, for people."""


def match(base: Checkpoint, tuned: Checkpoint, *, rules: Sequence[str] = (), experts: Experts = "none") -> Match:
    """See two checkpoints as two states of one model, tensor by tensor.

    Args:
        base: The checkpoint before.
        tuned: The checkpoint after.
        rules: `regex=>replacement`, over the tensor names of both.
        experts: As what the matrices of a mixture of experts are seen (`experts.see_experts`).

    Raises:
        MismatchError: They cannot be seen so.
        ValueError: A rule is malformed, or changes no name.
    """
    base, told_base = by_rules(base, rules)
    tuned, told_tuned = by_rules(tuned, rules)
    notes = [*told_base, *told_tuned]
    if idle := [rule for rule in rules if not any(f"--map {rule}:" in note for note in notes)]:
        names = list(tuned.headers)
        raise ValueError(f"`--map {idle[0]}` changes no tensor name. Names look like `{names[len(names) // 2]}`.")
    layout = layout_of(base, tuned)
    base, tuned, layout = see_experts(base, tuned, layout, experts)
    tuned, told = as_named(tuned, {name: header.shape for name, header in base.headers.items()}, layout)
    return Match(base, tuned, layout, (*notes, *told))
