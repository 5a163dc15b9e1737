"""Both models without their weights: a block of each is in memory while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch

from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.refinement.chain import chains_of
from peft_posthoc.refinement.in_turns import InTurns, load_empty
from peft_posthoc.refinement.walk import Walk
from peft_posthoc.texts.distance import Score, Sum, by_kind
from peft_posthoc.texts.sequences import Tokens


@dataclass(frozen=True, kw_only=True)
class Streamed(InTurns):
    """A tuned model, and its base with an adapter on it, without weights but for the adapter's."""

    where: torch.device

    @property
    def device(self) -> torch.device:
        """Where logits are compared."""
        return self.where

    @torch.no_grad()
    def distances(self, texts: Sequence[Tokens], *, size: int) -> Score:
        """How far base + adapter is from the tuned model, on texts of each kind, `size` at a time."""
        parts = by_kind(texts, size, self.where)
        sums = {kind: Sum() for kind, _ in parts}
        with Walk(chains_of(self), [batch for _, batch in parts]) as walk:
            for stretch in walk.stretches():
                if stretch.role == "exit":
                    with stretch.held():
                        for place, (kind, _) in enumerate(parts):
                            for piece in stretch.pieces(place):
                                mine, theirs = (run() for run in piece.run)
                                sums[kind].add(mine, theirs, piece.counted)
        return {kind: one.distance() for kind, one in sums.items()}

    def check_finite(self) -> None:
        """Nothing: each is seen to say numbers when it is loaded to write."""


def load_streamed(
    base: Checkpoint,
    tuned: Checkpoint,
    adapter: str | PathLike[str],
    file: AdapterFile,
    *,
    device: torch.device,
    tokenizer: Any = None,
) -> Streamed:
    """Build both models without weights and put the adapter on the base (see `load_empty`)."""
    found = load_empty(base, tuned, adapter, file, device=device, tokenizer=tokenizer)
    return Streamed(**vars(found), where=device)
