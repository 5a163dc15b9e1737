"""Weights that a configuration calls one, and that a checkpoint stores under both names all the same."""

from __future__ import annotations

import torch

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.view import View, same
from peft_posthoc.models.layout import Layout


def without_false_ties(layout: Layout, *checkpoints: Checkpoint) -> Layout:
    """The layout without ties that a checkpoint contradicts: transformers loads each of its tensors where it belongs.

    What can be read once only is taken at its word.
    """
    apart: set[str] = set()
    for checkpoint in checkpoints:
        stored = {} if checkpoint.sequential else {layout.name_of(name): name for name in checkpoint.headers}
        for owner, users in layout.shared.items():
            for user in users:
                if owner in stored and user in stored and _differ(checkpoint, stored[owner], stored[user]):
                    apart.add(stored[user])
    return layout.without_ties(apart) if apart else layout


def once(checkpoint: Checkpoint, layout: Layout) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint without tied weights that it stores again under a second name, and a line of it for people.

    Args:
        checkpoint: What is stored.
        layout: Of its model, without ties that it contradicts.
    """
    stored = {} if checkpoint.sequential else {layout.name_of(name): name for name in checkpoint.headers}
    again = {
        stored[user]: stored[owner]
        for owner, users in layout.shared.items()
        for user in users
        if owner in stored and user in stored
    }
    if not again:
        return checkpoint, ()
    pieces = {name: same(checkpoint, name) for name in checkpoint.headers if name not in again}
    second, first = next(iter(again.items()))
    note = f"Names of `{checkpoint.label}`: {len(again)} for the second time (`{second}` is `{first}`)"
    return View(checkpoint, pieces, loadable=True, module=checkpoint.module), (note,)


def _differ(checkpoint: Checkpoint, one: str, other: str) -> bool:
    alike = checkpoint.headers[one] == checkpoint.headers[other]
    return not alike or not torch.equal(checkpoint.read(one), checkpoint.read(other))
