"""The models of a merge as we read checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.memory import InMemory
from peft_posthoc.extraction.plan import Plan, everything, make_plan
from peft_posthoc.sources import open_checkpoint


def folder_of(model: Hashable) -> str | None:
    """Where the weights of an input lie, adapters merged; None if it is no model folder but a file or a state dict."""
    if not isinstance(model, ModelReference) or Path(model.model.path).is_file():
        return None
    return str(LoaderCache().get(model).index.base_path)


@cache
def plan_of(base: str, tuned: str) -> Plan:
    """The plan of what can be carried between two model folders, from their headers.

    The shapes are taken from the base: by the time that weights meet in a merge, mergekit has made them equal.
    """
    before, after = open_checkpoint(base, role="base"), open_checkpoint(tuned, role="tuned")
    shared = {name: before.headers.get(name, header) for name, header in after.headers.items()}
    return make_plan(
        described(before.headers, before.label, before.config),
        described(shared, after.label, after.config),
        choose=everything,
    )


def described(headers: Mapping[str, Header], label: str, config: Mapping[str, Any] | None) -> Checkpoint:
    """A checkpoint of which only the headers are there."""
    tensors = {name: torch.empty(header.shape, dtype=header.dtype, device="meta") for name, header in headers.items()}
    checkpoint = InMemory(tensors, label=label)
    checkpoint.config = config
    return checkpoint


class AsMerged(Checkpoint):
    """A model on disk under the names, and in the type, in which a merge reads it.

    mergekit finds a weight under its name or another one, or makes it from several as transformers does (the experts of
    a mixture are stacked). What it does not ask for keeps its name.

    Args:
        checkpoint: The model.
        weights: What the merge asks for.
        dtype: What it casts to, if it does.
    """

    def __init__(self, checkpoint: Checkpoint, weights: Iterable[WeightInfo], dtype: torch.dtype | None) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self.label, self.revision, self.config = checkpoint.label, checkpoint.revision, checkpoint.config
        self.identity = [checkpoint.identity, str(dtype)] if checkpoint.identity else None
        self._names: dict[str, str] = {}
        # An expert's matrices are taken from two stacks (gate and up, down), each made from all experts'.
        self._made_last: dict[str, Tensor] = {}
        self.headers: dict[str, Header] = {}
        used = set()
        for weight in weights:
            stored = next((n for n in (weight.name, *(weight.aliases or ())) if n in checkpoint.headers), None)
            if stored is not None:
                self._names[weight.name] = stored
                used.add(stored)
            elif (made := self._made(weight.name)) is not None:
                self.headers[weight.name] = made[0]
                used |= made[1]
        self._names |= {name: name for name in checkpoint.headers if name not in used}
        self.headers |= {new: self._header(checkpoint.headers[old]) for new, old in self._names.items()}

    def read(self, name: str) -> Tensor:
        """The tensor of the merge's name, in the merge's type."""
        if name in self._names:
            tensor = self._checkpoint.read(self._names[name])
        else:
            if name not in self._made_last:
                self._made_last = dict([*self._made_last.items()][-1:])
                self._made_last[name] = self._converted(name, self._checkpoint.read)
            tensor = self._made_last[name]
        return tensor.to(self._header(Header((), tensor.dtype)).dtype)

    def steps(self, name: str) -> Tensor | None:
        """The steps of its grid, where it is one tensor of the checkpoint that is quantised."""
        return self._checkpoint.steps(self._names[name]) if name in self._names else None

    def coded_as(self, name: str) -> str | None:
        """The format of the same."""
        return self._checkpoint.coded_as(self._names[name]) if name in self._names else None

    def _made(self, name: str) -> tuple[Header, set[str]] | None:
        """Shape and type of a tensor that is made from others, and their names; None if it cannot be made."""
        used = set()

        def empty(source: str) -> Tensor:
            used.add(source)
            header = self._checkpoint.headers[source]
            return torch.empty(header.shape, dtype=header.dtype, device="meta")

        tensor = self._converted(name, empty)
        return None if tensor is None else (self._header(Header(tuple(tensor.shape), tensor.dtype)), used)

    def _converted(self, name: str, read: Callable[[str], Tensor]) -> Any:
        sources = {source: partial(read, source) for source in self._checkpoint.headers}
        return convert_checkpoint_tensors((self.config or {}).get("model_type"), sources, name)

    def _header(self, header: Header) -> Header:
        floats = self._dtype is not None and header.dtype.is_floating_point
        return Header(header.shape, self._dtype if floats and self._dtype else header.dtype)
