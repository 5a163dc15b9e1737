"""How far one model's next tokens are from another's: KL divergence and agreement, per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_posthoc.compute.together import ALONE, Together
from peft_posthoc.texts.sequences import KINDS, Batch, Kind, Tokens, batches

Model = Callable[[Batch], Tensor]
"""From a batch to logits, `texts x tokens x vocabulary`."""


@dataclass(frozen=True)
class Distance:
    """How far a model is from the tuned one, on texts of one kind."""

    kl: float
    """KL(tuned || model) per token, in nats."""
    top1: float
    """Share of the tokens after which both would say the same next."""
    tokens: int


Score = Mapping[Kind, Distance]


def divergence(said: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """KL(wanted || said) summed over the tokens of a batch, in float32 or better and differentiable in `said`.

    Args:
        said: Logits of the model, `texts x tokens x vocabulary`.
        wanted: The tuned model's.
        mask: `texts x tokens`, 1 for those that count.
    """
    chosen = mask.bool()
    wide = torch.promote_types(said.dtype, torch.float32)
    mine, theirs = (torch.log_softmax(x[chosen].to(wide), dim=-1) for x in (said, wanted))
    return torch.nn.functional.kl_div(mine, theirs, reduction="sum", log_target=True)


class Sum:
    """What distances on some tokens come to."""

    def __init__(self) -> None:
        self.values = torch.zeros(3, dtype=torch.float64)
        """Divergence, tokens with the same next one, tokens."""

    def add(self, said: Tensor, wanted: Tensor, mask: Tensor) -> None:
        """Add what two models say (see `divergence`)."""
        same = ((said.argmax(-1) == wanted.argmax(-1)) & mask.bool()).sum()
        lacking = divergence(said, wanted, mask).item()
        self.values += torch.tensor([lacking, int(same), int(mask.sum())], dtype=torch.float64)

    def distance(self) -> Distance:
        """The mean."""
        kl, same, count = self.values.tolist()
        return Distance(max(kl / count, 0.0), same / count, int(count))


@torch.no_grad()
def distances(
    model: Model,
    wanted: Model,
    texts: Sequence[Tokens],
    *,
    size: int,
    device: torch.device,
    together: Together = ALONE,
) -> dict[Kind, Distance]:
    """The distance on the texts of each kind that is among them; several processes share them out."""
    parts = by_kind(texts, size, device)
    sums = {kind: Sum() for kind, _ in parts}
    with together.agreed():
        for (kind, batch), counts in together.turns(parts):
            said, asked = model(batch), wanted(batch)
            if counts:
                sums[kind].add(said, asked, batch.counted)
    for total in sums.values():
        together.sum([summed := total.values.to(device)])
        total.values = summed
    return {kind: total.distance() for kind, total in sums.items()}


def by_kind(texts: Sequence[Tokens], size: int, device: torch.device) -> list[tuple[Kind, Batch]]:
    """The texts in batches, each of texts of one kind, the short ones first."""
    by_length = sorted(texts, key=lambda text: len(text.ids))
    sides = [(kind, [text for text in by_length if text.kind == kind]) for kind in KINDS]
    return [(kind, batch) for kind, own in sides for batch in batches(own, size, device=device)]
