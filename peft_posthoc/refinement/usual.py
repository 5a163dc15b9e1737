"""The method that is taken where none is named: by the memory at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.compute.memory import free_memory
from peft_posthoc.refinement.blocks import blocks
from peft_posthoc.refinement.distil import distil
from peft_posthoc.refinement.method import Method, check_positive
from peft_posthoc.sources import Source, open_checkpoint

# Of the free memory, what both models may take: the rest is for a batch.
_MODELS = 0.75


@dataclass(frozen=True)
class Usual:
    """`distil`, which measures best; `blocks`, where both models at once are more than the memory holds.

    Where they are more than the GPU of each process holds, but not than those of all hold, `distil` splits them.

    Args:
        lr: Of whichever it is (see there); its own if None.
        passes: The same.
        bf16: The same.
    """

    lr: float | None = None
    passes: float | None = None
    bf16: bool | None = None

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, passes=self.passes)

    def method(
        self,
        base: Source | None,
        tuned: Source,
        *,
        base_revision: str | None = None,
        tuned_revision: str | None = None,
        device: torch.device,
        processes: int = 1,
    ) -> Method:
        """The one for two models.

        Args:
            base: The model before; None where it is alive.
            tuned: The model after.
            base_revision: Branch, tag or commit, where `base` is a hub id.
            tuned_revision: The same for `tuned`.
            device: Where they would be.
            processes: How many hold them.
        """
        own: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}
        if base is None or isinstance(base, torch.nn.Module) or isinstance(tuned, torch.nn.Module):
            return distil(**own)
        sides = open_checkpoint(base, revision=base_revision), open_checkpoint(tuned, revision=tuned_revision)
        taken, free = sum(map(_in_float32, sides)), _MODELS * free_memory(device)
        narrow = _in_float32(sides[0]) / 2 if self.bf16 else 0  # The base's weights, as a step multiplies them.
        # A CPU has one memory for all, and nothing is won by splitting there; GPUs have one each.
        if (processes if device.type == "cpu" else 1) * (taken + narrow) <= free:
            return distil(**own)
        splits = device.type != "cpu" and processes > 1
        part = taken / processes + max(sum(header.bytes for header in side.headers.values()) for side in sides)
        return distil(shard=True, **own) if splits and part + narrow <= free else blocks(**own)


def _in_float32(checkpoint: Checkpoint) -> int:
    return sum(4 * torch.Size(header.shape).numel() for header in checkpoint.headers.values())
