"""Where weights come from: a folder, a file, a hub id, base + adapter, a module or a state dict, as named tensors.

A source is any object with the attributes of `Checkpoint`; `open_checkpoint` is the one place that chooses among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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
    """Named tensors, read one at a time."""

    @property
    def label(self) -> str:
        """The user's own name for it: a path, a hub id, or the class of a live object."""

    @property
    def revision(self) -> str | None:
        """The resolved commit of a hub id; None elsewhere."""

    @property
    def folder(self) -> Path | None:
        """A folder that transformers can load it from, if there is one; a hub id's has the weights once one is read."""

    @property
    def identity(self) -> Any:
        """Plain JSON values that change when the tensors do; None for tensors in memory."""

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The model's configuration (`config.json`), if there is one."""

    @property
    def module(self) -> nn.Module | None:
        """The live module, if it is one."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Shape and dtype of every tensor, without reading one."""

    @property
    def sequential(self) -> bool:
        """True where each tensor can be read once only, in the order of `headers`: it is made as it is read."""

    def read(self, name: str) -> Tensor:
        """The tensor of that name, in its own dtype. It may share memory with its source and must not be changed."""


def once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those that are another one under a second name: tied weights, as safetensors stores them."""
    seen: set[tuple[object, ...]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.is_meta or not tensor.numel() or identity not in seen:
            kept[name] = tensor
        seen.add(identity)
    return kept
