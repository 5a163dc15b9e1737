"""Where weights come from: a folder, a file, a hub id, base + adapter, a module or a state dict, as named tensors.

A source is any object with the attributes of `Checkpoint`; `open_checkpoint` is the one place that chooses among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Header(NamedTuple):
    """Shape and dtype of a tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size on disk, in bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@runtime_checkable
class Checkpoint(Protocol):
    """Named tensors, read one at a time. A class derived from it names only what it has of what is None here."""

    label: str
    """The user's own name for it: a path, a hub id, or the class of a live object."""
    headers: Mapping[str, Header]
    """Shape and dtype of every tensor, without reading one."""
    config: Mapping[str, Any] | None = None
    """The model's configuration (`config.json`), if there is one."""
    metadata: Mapping[str, str] = MappingProxyType({})
    """What its files say of themselves, beside their tensors."""
    revision: str | None = None
    """The resolved commit of a hub id; None elsewhere."""
    identity: Any = None
    """Plain JSON values that change when the tensors do; None for tensors in memory."""
    folder: Path | None = None
    """A folder that transformers can load it from, if there is one; a hub id's has the weights once one is read."""
    module: nn.Module | None = None
    """The live module, if it is one."""
    to_fetch: int = 0
    """Bytes that are downloaded when the first tensor is read."""
    sequential: bool = False
    """True where each tensor can be read once only, in the order of `headers`: it is made as it is read."""
    handed: bool = False
    """True where transformers is handed the tensors, as they are made here: of codes, or of a base and an adapter."""

    def read(self, name: str) -> Tensor:
        """The tensor of that name, in its own dtype. It may share memory with its source and must not be changed."""

    def steps(self, name: str) -> Tensor | None:
        """Of a tensor that is decoded from codes, the grid's step at each value; None where it is stored as it is."""
        return None

    def coded_as(self, name: str) -> str | None:
        """Of a tensor that is decoded from codes, the name of their format; None where it is stored as it is."""
        return None


def place_of(checkpoint: Checkpoint) -> Path | None:
    """The folder with what lies beside the weights, such as a tokenizer.

    It is the `folder`, or what a checkpoint has as `beside` where transformers cannot load the model from it.
    """
    return getattr(checkpoint, "beside", None) or checkpoint.folder


def once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those that are another one under a second name: tied weights, as safetensors stores them."""
    seen: set[tuple[object, ...]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        # A table of what codes mean is shared by all weights that were quantised in one process, and tied to none.
        if tensor.is_meta or not tensor.numel() or identity not in seen or name.endswith("quant_map"):
            kept[name] = tensor
        seen.add(identity)
    return kept
