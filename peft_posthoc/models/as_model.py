"""A checkpoint in the pieces that its model has: what is stored otherwise is converted when it is read."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.view import Piece, View, same
from peft_posthoc.models.layout import Conversion, Layout


def as_model(checkpoint: Checkpoint, layout: Layout) -> Checkpoint:
    """The checkpoint with the model's own tensors in place of those that are in other pieces on disk.

    Tensors that are the same under another name keep theirs, but for a tied weight that is stored under its second name
    alone (`lm_head.weight`, by `safetensors.torch.save_model`): it gets the first.
    """
    second = second_names(checkpoint, layout)
    instead: dict[str, dict[str, Piece]] = {
        name: {owner: same(checkpoint, name)} for name, owner in second.items() if owner not in checkpoint.headers
    }
    last = _Last()
    for conversion in layout.conversions:
        headers = converted(checkpoint, conversion)
        if headers:
            pieces = {
                name: Piece(conversion.sources, header, partial(last.read, conversion, name))
                for name, header in headers.items()
            }
            instead |= {source: {} for source in conversion.sources} | {conversion.sources[0]: pieces}
    if not instead:
        return checkpoint
    pieces = {}
    for name in checkpoint.headers:
        pieces |= instead[name] if name in instead else {name: same(checkpoint, name)}
    return View(checkpoint, pieces, loadable=True, module=checkpoint.module)


def converted(checkpoint: Checkpoint, conversion: Conversion) -> dict[str, Header]:
    """The model's tensors that are made of a checkpoint's; none if it does not store the sources, or stores both."""
    headers = checkpoint.headers
    if not headers.keys() >= {*conversion.sources}:
        return {}
    sources = [headers[name] for name in conversion.sources]
    empty = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in sources]
    try:
        made = conversion.make(*empty)
    except Exception:
        # Every operation fails in its own way on shapes that it does not expect; they stay as they are, and are told.
        return {}
    if not made.keys().isdisjoint(headers):
        return {}
    return {name: Header(tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}


def second_names(checkpoint: Checkpoint, layout: Layout) -> dict[str, str]:
    """By name on disk, the first of a tied weight's names, where only another one is stored."""
    stored = {layout.name_of(name): name for name in checkpoint.headers}
    found: dict[str, str] = {}
    for owner, users in layout.shared.items():
        user = next((user for user in users if user in stored), None)
        if owner not in stored and user is not None:
            found[stored[user]] = owner
    return found


class _Last:
    """The pieces that were made last: those of one tensor are read one after the other."""

    def __init__(self) -> None:
        self._made: tuple[Conversion | None, dict[str, Tensor]] = None, {}

    def read(self, conversion: Conversion, name: str, *tensors: Tensor) -> Tensor:
        last, made = self._made
        if last is not conversion:
            made = conversion.make(*tensors)
            self._made = conversion, made
        return made[name]
