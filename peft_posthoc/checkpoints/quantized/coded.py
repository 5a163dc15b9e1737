"""A weight that is stored as codes: which tensors it lies in, and how its numbers are made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.errors import CheckpointError

# What names in ComfyUI's files may begin with, and those in its account of layers not.
_MODELS = ("model.diffusion_model.", "diffusion_model.")


class Coded(NamedTuple):
    """A weight that is made of stored tensors."""

    sources: tuple[str, ...]
    """What is read to make it: the codes, then what lies beside them."""
    header: Header
    """Of the weight: its shape, and the type that it is decoded to."""
    make: Callable[..., Tensor]
    """The weight, from the sources in their order."""
    bits: int
    """Of a code."""
    format: str
    """What it is called: `FP8`, `FP8 by row`, `4-bit integers`."""
    along: int = 0
    """The side of the codes along which words go on, where codes straddle them."""
    beside: tuple[str, ...] = ()
    """Stored tensors that go with it and are not read: the scales of activations, a shape."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint with quantised weights, as readers see it."""

    checkpoint: Checkpoint
    told: Mapping[str, Any]
    """What says how it was quantised: `quantization_config`, or what stands for it. Empty where nothing does."""
    dtype: torch.dtype
    """Of the model, as its configuration says."""

    taken: Collection[str] = ()
    """What belongs to weights that are found already."""

    @cached_property
    def headers(self) -> Mapping[str, Header]:
        """Of all others that are stored."""
        return {name: header for name, header in self.checkpoint.headers.items() if name not in self.taken}

    @property
    def method(self) -> str:
        """By what it was quantised, as its configuration says."""
        told = self.told.get("quant_method") or self.told.get("method") or ""  # GPTQModel's name of it.
        return str(getattr(told, "value", told))  # Of a live model it is one of transformers' own.

    def number(self, key: str) -> int:
        """A whole number that says how it was quantised; 0 where none does."""
        value = self.told.get(key)
        return value if isinstance(value, int) else 0

    def layer(self, name: str) -> Mapping[str, Any] | None:
        """What ComfyUI says of a tensor's module, in the file's header or in a tensor of the module itself; else None.

        Raises:
            CheckpointError: It is no JSON.
        """
        module = name.rpartition(".")[0]
        layers = self.told.get("layers")
        if self.method == "ComfyUI" and isinstance(layers, Mapping):
            own = (layers.get(module.removeprefix(begin)) for begin in ("", *_MODELS))
            return next((one for one in own if isinstance(one, Mapping)), None)
        mark = self.beside(name, "comfy_quant")
        if mark is None:
            return None
        try:
            read: Mapping[str, Any] = json.loads(bytes(self.checkpoint.read(mark).tolist()))
        except ValueError as error:
            raise CheckpointError(f"`{mark}` of `{self.checkpoint.label}` is no JSON: {error}.") from error
        return read

    @property
    def schemes(self) -> list[Mapping[str, Any]]:
        """What compressed-tensors says of the weights of each of its groups of layers."""
        groups = self.told.get("config_groups") or {}
        told = (group.get("weights") for group in groups.values() if isinstance(group, dict))
        return [one for one in told if isinstance(one, dict)]

    def beside(self, name: str, *leaves: str) -> str | None:
        """The first of `leaves` that is stored in the module of a tensor, in full."""
        module = name.rpartition(".")[0]
        names = (f"{module}.{leaf}" if module else leaf for leaf in leaves)
        return next((own for own in names if own in self.headers), None)

    def all_beside(self, name: str, *leaves: str) -> tuple[str, ...]:
        """All of `leaves` that are stored in the module of a tensor, in full."""
        return tuple(own for leaf in leaves if (own := self.beside(name, leaf)))


class Reader(Protocol):
    """What knows one way of storing: it finds its own weights, told by names and types."""

    def __call__(self, stored: Stored) -> Iterator[tuple[str, Coded]]:
        """Each weight by its own name. Small tensors may be read, codes not.

        Raises:
            CheckpointError: What is stored fits no weight: a scale of another shape, or none.
        """
