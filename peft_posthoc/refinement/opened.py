"""What is refined, opened: an adapter in a folder, one just extracted, or one on a live model; and both models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from peft_posthoc.adapters.open import open_adapter
from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.compute.device import pick_device
from peft_posthoc.errors import AdapterError
from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.refinement.chain import check_chains
from peft_posthoc.refinement.movable import as_found
from peft_posthoc.refinement.sharded import load_sharded
from peft_posthoc.refinement.streamed import load_streamed
from peft_posthoc.running.live import Live, Side, check_pair, label, load_live, load_side
from peft_posthoc.running.load import save_adapter
from peft_posthoc.sources import Source, open_checkpoint

Refinable: TypeAlias = str | os.PathLike[str] | Adapter | nn.Module
"""A PEFT LoRA folder, what `extract` gave, or PEFT's model with the adapter on it."""


class Opened(NamedTuple):
    """An adapter's file, and both models alive."""

    called: str
    """The adapter, in messages."""
    file: AdapterFile
    live: Live
    tuned: str
    """What the tuned model is called."""
    models: Any
    """Plain values that change when a model's tensors do; None where one is in memory."""


@contextmanager
def opened(
    adapter: Refinable,
    base: Source | None,
    tuned: Source,
    *,
    base_revision: str | None,
    tuned_revision: str | None,
    device: str,
    tokenizer: Any,
    adapter_name: str,
    streams: bool = False,
    shard: bool = False,
) -> Iterator[Opened]:
    """Open all that a fit needs; live models are as they were found when the `with` block ends.

    Raises:
        AdapterError: The adapter is no plain LoRA, or PEFT does not load it.
        CheckpointError: A model cannot be loaded, or says no next tokens.
        MismatchError: The two models are of two classes, or know other tokens.
        ValueError: A base is given for a live adapter, or none for another.
    """
    if isinstance(adapter, nn.Module) == (base is not None):
        raise ValueError(
            "`refine(base=...)` is the model that the adapter is for; a model with the adapter on it holds its own."
        )
    if shard and any(isinstance(one, nn.Module) for one in (adapter, base, tuned)):
        raise ValueError("`distil(shard=True)` splits models as it loads them: give folders or hub ids, no live ones.")
    if (
        isinstance(adapter, nn.Module)
        and isinstance(tuned, nn.Module)
        and {*adapter.parameters()} & {*tuned.parameters()}
    ):
        raise ValueError("`tuned` is the model that the adapter is on, or shares weights with it: give one of its own.")
    after, before = _side(tuned, tuned_revision, "tuned"), None
    with TemporaryDirectory() as place:
        if isinstance(adapter, nn.Module):
            _check_unmerged(adapter)
            called = f"adapter `{adapter_name}` of {label(adapter)}"
            file = open_adapter(save_adapter(adapter, place, adapter_name))
            where: Any = adapter.device
            live = Live(adapter, load_side(after, where), tokenizer, adapter_name)
        else:
            if isinstance(adapter, Adapter):
                folder, called = Path(place) / "adapter", f"adapter of {adapter.provenance['tuned']}"
                adapter.save(folder)
            else:
                folder, called = Path(adapter), str(adapter)
            file = open_adapter(folder)
            before = _side(base, base_revision, "base")
            if hasattr(before, "peft_config"):
                raise AdapterError(
                    f"The base, {label(before)}, has an adapter on it. Give what `merge_and_unload()` makes of it, or "
                    "the model alone, `refine(model, tuned=...)`, to refine that adapter."
                )
            # What is alive is in memory already.
            apart = streams and isinstance(before, Checkpoint) and isinstance(after, Checkpoint)
            load: Any = load_streamed if apart else load_sharded if shard else load_live
            live = load(before, after, folder, file, device=pick_device(device), tokenizer=tokenizer)
        with as_found(live.adapted, live.tuned):
            check_pair(live.adapted, live.tuned, [label(live.adapted if before is None else before), label(after)])
            live.adapted.set_adapter(live.name)
            live.adapted.base_model.enable_adapter_layers()
            live.adapted.eval()
            live.tuned.eval()
            if streams:
                check_chains(live)  # Before any text is written.
            known = [getattr(side, "identity", None) for side in (before, after)]
            yield Opened(called, file, live, label(after), known if all(known) else None)


def _side(source: Any, revision: str | None, role: str) -> Side:
    if isinstance(source, nn.Module):
        return source
    return open_checkpoint(source, revision=revision, role=role, modules=True)


def _check_unmerged(model: Any) -> None:
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        raise AdapterError("An adapter is merged into the model's weights: call `unmerge_adapter()` on it first.")
