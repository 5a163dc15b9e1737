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
    """KL(wanted || said) summed over the tokens of a batch, in float32 and differentiable in `said`.

    Args:
        said: Logits of the model, `texts x tokens x vocabulary`.
        wanted: The tuned model's.
        mask: `texts x tokens`, 1 for those that count.
    """
    chosen = mask.bool()
    mine, theirs = (torch.log_softmax(x[chosen].float(), dim=-1) for x in (said, wanted))
    return torch.nn.functional.kl_div(mine, theirs, reduction="sum", log_target=True)


class Sum:
    """What distances on some tokens come to."""

    def __init__(self) -> None:
        self.values = torch.zeros(3, dtype=torch.float64)
        """Divergence, tokens with the same next one, tokens."""

    def add(self, said: Tensor, wanted: Tensor, mask: Tensor) -> None:
        """Add what two models say (see `divergence`)."""
        same = ((said.argmax(-1) == wanted.argmax(-1)) & mask.bool()).sum()
        self.values += torch.tensor([divergence(said, wanted, mask).item(), int(same), int(mask.sum())])

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
    found: dict[Kind, Distance] = {}
    for kind in KINDS:
        own = sorted((text for text in texts if text.kind == kind), key=lambda text: len(text.ids))
        if not own:
            continue
        total = Sum()
        with together.agreed():
            for batch in batches(together.share(own), size, device=device):
                total.add(model(batch), wanted(batch), batch.mask)
        together.sum([summed := total.values.to(device)])
        total.values = summed
        found[kind] = total.distance()
    return found
