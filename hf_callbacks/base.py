"""Which model a fine-tune started from: given, told by its name, or kept before the first step."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_callbacks.pin import pin, remade
from peft_posthoc.checkpoints.checkpoint import Checkpoint, once
from peft_posthoc.checkpoints.memory import loaded_from
from peft_posthoc.errors import CheckpointError, PosthocError, one_line
from peft_posthoc.sources import open_checkpoint

# Values of each tensor, and tensors, that are compared to see whether a folder holds the model that will be trained.
_VALUES, _TENSORS = 4096, 16


class Base(NamedTuple):
    """A model that can be read again in every later run."""

    source: str
    """A folder or a hub id."""
    revision: str | None
    how: str
    """Why it is this one, for the log."""


def given(base: str | PathLike[str], revision: str | None) -> Base:
    """The base that the user names, wherever the program goes on."""
    return Base(str(Path(base).absolute()) if Path(base).exists() else str(base), revision, "it was given")


def find_base(model: nn.Module, output: Path, work: Path) -> Base:
    """The model as it is now: where it was loaded from, if that still holds it, or a snapshot.

    Args:
        model: Before its first step.
        output: The run's folder, whose checkpoints come and go: nothing in it is a base.
        work: Where a snapshot goes.

    Raises:
        CheckpointError: Its weights are spread over processes, so that no snapshot can be taken.
    """
    model = getattr(model, "_orig_mod", model)
    name = loaded_from(model)
    if name:
        inside = Path(name).is_dir() and Path(name).resolve().is_relative_to(output.resolve())
        try:
            found = open_checkpoint(name)
            reason = _differs(found, model)
        except PosthocError as error:
            found, reason = None, one_line(error)
        if reason is None and found is not None:
            if not inside:
                source = str(Path(name).resolve()) if Path(name).is_dir() else name
                return Base(source, found.revision, f"the model was loaded from `{name}`")
            kept = pin(Path(name), work / "base")
            return Base(str(kept), None, f"links to `{name}`, which lies in the run's own folder")
        why = f"`{name}` does not hold the model that is trained: {reason}"
    else:
        why = "the model does not say where it was loaded from"
    return Base(str(_snapshot(model, work / "base")), None, f"a snapshot, because {why}")


def _differs(found: Checkpoint, model: nn.Module) -> str | None:
    """Why a checkpoint is not what the live model holds; None if it is, as far as is seen."""
    live = model.state_dict()
    shared = [name for name in found.headers if name in live]
    if not shared:
        return "no name of a weight is the same"
    whole = [name for name in shared if _is_whole(live[name])]
    for name in whole:
        if tuple(live[name].shape) != found.headers[name].shape:
            return f"`{name}` has another shape"
    for name in whole[:: max(1, len(whole) // _TENSORS)]:
        ours = live[name].detach().reshape(-1)[:_VALUES].cpu()
        theirs = found.read(name).reshape(-1)[:_VALUES]
        if not torch.equal(ours, theirs.to(ours.dtype)):
            return f"`{name}` has other values"
    return None


def _is_whole(tensor: Tensor) -> bool:
    """Tell whether this process holds all of it: neither sharded, nor partitioned away, nor on the meta device."""
    return type(tensor.data) is Tensor and tensor.numel() > 0 and not tensor.is_meta


def _snapshot(model: nn.Module, to: Path) -> Path:
    if not all(_is_whole(parameter) for parameter in model.parameters()):
        raise CheckpointError(
            "The model's weights are spread over processes, and no snapshot of them can be taken. Give "
            "`PosthocLoraCallback(base=...)` the model that the fine-tune starts from."
        )
    save: Any = getattr(model, "save_pretrained", None)
    with remade(to, what="The snapshot of the initial weights") as half:
        if callable(save):
            save(half)
        else:
            weights = {name: t.contiguous() for name, t in once(model.state_dict()).items()}
            save_file(weights, half / "model.safetensors")
    return to
