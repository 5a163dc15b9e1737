"""Both models split among processes (PyTorch's FSDP): each holds a part of every weight, and a block while it runs."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Any

import torch

from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import PosthocError
from peft_posthoc.refinement.chain import blocks_of
from peft_posthoc.refinement.in_turns import InTurns, load_empty
from peft_posthoc.running.empty import Weights


def load_sharded(
    base: Checkpoint,
    tuned: Checkpoint,
    adapter: str | PathLike[str],
    file: AdapterFile,
    *,
    device: torch.device,
    tokenizer: Any = None,
) -> InTurns:
    """Build both models with a part of their weights in each process; the adapter's are in all of them.

    Raises:
        AdapterError: PEFT cannot load the adapter.
        CheckpointError: A model cannot be built, or is none that says next tokens.
        MismatchError: They are of two classes.
        PosthocError: A model has no list of blocks.
    """
    found = load_empty(base, tuned, adapter, file, device=device, tokenizer=tokenizer)
    for model, own in zip((found.model, found.tuned), found.weights, strict=True):
        if own is not None:
            _split(model, own, device)
    return replace(found, weights=(None, None))


def check_processes(count: int) -> None:
    """See that there are several.

    Raises:
        PosthocError: There is one alone.
    """
    if count == 1:
        raise PosthocError(
            "There is one process, and no other to split the models with: start several with torchrun, or take "
            "`blocks`, which has a block of each in memory at a time."
        )


@torch.no_grad()
def _split(model: Any, weights: Weights, device: torch.device) -> None:
    """Give a model without weights a part of each."""
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh = init_device_mesh(device.type, (get_world_size(),))
    whole = {own for own in model.parameters() if not own.is_meta}  # The adapter's.
    for part in (*blocks_of(model), model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model._apply(lambda own: torch.empty_like(own, device=device) if own.is_meta else own)
    for module in model.modules():
        for leaf, own in module._parameters.items():
            if isinstance(own, DTensor):
                value = weights.tensor(module, leaf, own)
                mine = distribute_tensor(value, mesh, own.placements, src_data_rank=None)
                own.to_local().copy_(mine.to_local())
