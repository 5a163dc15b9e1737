"""A model with a LoRA adapter on it, read as PEFT computes with the two: base + scale * b @ a, a tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_posthoc.adapters.config import CONFIG
from peft_posthoc.adapters.factors import Factors, merged
from peft_posthoc.adapters.peft_format import WEIGHTS, Stored, read_folder
from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.files import state_of
from peft_posthoc.errors import AdapterError
from peft_posthoc.models.find import layout_of
from peft_posthoc.models.kinds import LayerKind
from peft_posthoc.models.layout import Layout


class _Change(NamedTuple):
    """What an adapter makes of one tensor."""

    source: str | None
    """The base's tensor that it changes; None if the adapter alone has it."""
    whole: Tensor | None
    """What takes its place."""
    factors: Factors | None
    bias: Tensor | None
    """What is added to it."""
    kind: LayerKind | None
    """Of the module, where there are factors."""

    def same(self, other: _Change) -> bool:
        """Whether the other one makes the same of it: then two modules that share a tensor go on sharing it."""

        def equal(x: Tensor | None, y: Tensor | None) -> bool:
            return x is y or (x is not None and y is not None and torch.equal(x, y))

        if self.factors is None or other.factors is None or self.kind is None or other.kind is None:
            factors = self.factors is other.factors
        else:
            (a, b), (c, d) = self.factors, other.factors
            c, d = (d.mT, c.mT) if self.kind.transposed != other.kind.transposed else (c, d)
            factors = equal(a, c) and equal(b, d)
        return factors and equal(self.whole, other.whole) and equal(self.bias, other.bias)


class Adapted:
    """A checkpoint with a PEFT LoRA adapter on it. What it changes is in float32, not rounded to the base's dtype."""

    module: nn.Module | None = None
    # transformers alone cannot load a model from it.
    folder: Path | None = None

    def __init__(self, base: Checkpoint, adapter: Path, *, label: str, revision: str | None = None) -> None:
        """Put an adapter on a checkpoint.

        Args:
            base: The model.
            adapter: The adapter's folder.
            label: What messages and reports call the two.
            revision: The adapter's commit, if it is from the hub.

        Raises:
            AdapterError: It does not fit, or is more than base + b @ a.
        """
        self.label = label
        self.revision = revision
        self.config = base.config
        self.sequential = base.sequential
        self._base = base
        self._changes = _changes(base, read_folder(adapter), label)
        self.headers: Mapping[str, Header] = dict(base.headers) | {
            name: self._header(change) for name, change in self._changes.items()
        }
        states = [[str(adapter.resolve()), file, *state_of(adapter / file)[1:]] for file in (CONFIG, WEIGHTS)]
        self.identity: Any = [base.identity, states] if base.identity is not None else None

    def _header(self, change: _Change) -> Header:
        old = self._base.headers[change.source] if change.source is not None else None
        if change.whole is not None:
            old = Header(tuple(change.whole.shape), change.whole.dtype)
        added = change.bias if change.bias is not None else change.factors.b if change.factors is not None else None
        if old is None:
            return Header(tuple(added.shape), added.dtype) if added is not None else Header((), torch.float32)
        return old if added is None else Header(old.shape, torch.promote_types(old.dtype, added.dtype))

    def read(self, name: str) -> Tensor:
        """One tensor of the base, with what the adapter makes of it."""
        change = self._changes.get(name)
        if change is None:
            return self._base.read(name)
        tensor = change.whole
        if tensor is None and change.source is not None:
            tensor = self._base.read(change.source)
        if change.factors is not None and change.kind is not None and tensor is not None:
            tensor = merged(tensor, change.factors, change.kind)
        if change.bias is not None:
            tensor = change.bias if tensor is None else tensor.to(self.headers[name].dtype) + change.bias
        if tensor is None:
            raise KeyError(name)
        return tensor


def _changes(base: Checkpoint, stored: Stored, label: str) -> dict[str, _Change]:
    """What the adapter makes of the base's tensors, by their names on disk; new ones have the model's own names.

    A tensor that two modules share, of which the adapter changes one, or each in its own way, is no longer shared: the
    second one's is a new tensor.

    Raises:
        AdapterError: The adapter has factors for what is no layer, or of another size.
    """
    if stored.stacked:
        raise AdapterError(
            f"`{label}`: the adapter has factors of stacked experts (`target_parameters`), which are not read here. "
            "Merge it into its base first (`PeftModel.merge_and_unload`)."
        )
    layout = layout_of(base)
    found: dict[str, _Change] = {}
    used: set[str] = set()
    for name, header in base.headers.items():
        first, *others = names = layout.names_of(name)
        used.update(names)
        own = _change(name, first, header, stored, layout, label)
        if own.whole is not None or own.factors is not None or own.bias is not None:
            found[name] = own
        for other in others:
            if other not in base.headers:
                change = _change(name, other, header, stored, layout, label)
                if not change.same(own):
                    found[other] = change
    for module in stored.factors:
        if f"{module}.weight" not in used:
            raise AdapterError(f"`{label}`: the adapter adapts `{module}`, which the base does not have as a layer.")
    # What the adapter alone has: a new head, LoRA's bias of a layer that has none.
    alone = {f"{module}.bias": _Change(None, None, None, bias, None) for module, bias in stored.biases.items()}
    alone |= {name: _Change(None, tensor, None, None, None) for name, tensor in stored.whole.items()}
    return found | {name: change for name, change in alone.items() if name not in used}


def _change(name: str, own: str, header: Header, stored: Stored, layout: Layout, label: str) -> _Change:
    module, _, leaf = own.rpartition(".")
    whole = stored.whole.get(own)
    factors = stored.factors.get(module) if leaf == "weight" else None
    kind = layout.kinds.get(module)
    if factors is not None:
        shape = header.shape if whole is None else tuple(whole.shape)
        size = kind.size(shape) if kind is not None else None
        if kind is None or size is None:
            raise AdapterError(f"`{label}`: the adapter adapts `{module}`, which the base does not have as a layer.")
        if (len(factors.b), factors.a.shape[1]) != size:
            got = " and ".join(str(list(factor.shape)) for factor in factors)
            raise AdapterError(
                f"`{label}`: the adapter's factors of `{module}` are {got}; the base's weight is {size[0]} x {size[1]}."
            )
    return _Change(name, whole, factors, stored.biases.get(module) if leaf == "bias" else None, kind)
