"""Models of transformers without their weights, and their weights read where and while they are needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from peft_posthoc.adapters.arrivals import loaded
from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import AdapterError, CheckpointError
from peft_posthoc.models.as_model import as_model
from peft_posthoc.models.find import layout_of
from peft_posthoc.running.load import config_of, told_of, with_adapter, write_as_told

# What PEFT puts between a module and its weight.
_WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.)")


def empty_model(checkpoint: Checkpoint, cls: Any) -> Any:
    """The model of a checkpoint that lies in a folder, without weights; tables that it computes itself are there.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    from accelerate import init_empty_weights

    with told_of(checkpoint):
        config = config_of(checkpoint, cls)
        with init_empty_weights():
            model = cls(config)
        write_as_told(model, checkpoint)
        return model.float().eval()


def empty_with_adapter(model: Any, adapter: str | PathLike[str], file: AdapterFile) -> Any:
    """A model without weights, with an adapter that has its own, in float32.

    Raises:
        AdapterError: PEFT cannot load it, or does not hold what is in the file.
    """
    wrapped = with_adapter(model, adapter, empty=True)
    for name, tensor in loaded(wrapped, {name: file.tensor(name) for name in file.headers}).items():
        module, _, leaf = name.rpartition(".")
        try:
            own = wrapped.get_submodule(module)
        except AttributeError as error:
            raise AdapterError(f"PEFT does not hold `{name}` of `{file.label}`; it is not refined.") from error
        own._parameters[leaf] = Parameter(tensor.float(), requires_grad=False)
    return wrapped


class Weights:
    """The weights of a model without any, in a checkpoint.

    Args:
        model: An adapter may be on it.
        checkpoint: That has them.
        device: Where they go to.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, device: torch.device) -> None:
        layout = layout_of(checkpoint)
        stored = as_model(checkpoint, layout)
        self._device, self._label = device, checkpoint.label
        self._read: dict[str, Callable[[], Tensor]] = {
            own: partial(stored.read, name) for name in stored.headers for own in layout.names_of(name)
        }
        # A tied weight of which both names are stored is none.
        self._read |= {name: partial(stored.read, name) for name in stored.headers}
        for stack in layout.stacks:
            if stack.parts and all(part in stored.headers for parts in stack.parts for part in parts):
                self._read[stack.name] = partial(_stacked, stored, stack.parts)
        own = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._names = {id(module): name for name, module in own.named_modules()}
        for name, buffer in own.named_buffers():
            if (name := _WRAPPED.sub("", name)) in self._read:
                buffer.data = self._read[name]().to(buffer.dtype)
        own._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))

    @contextmanager
    def held(self, module: nn.Module, *, but: Container[nn.Module] = ()) -> Iterator[None]:
        """Have the weights of a module in memory, in float32.

        Args:
            module: Of the model.
            but: Modules in it that stay without.

        Raises:
            CheckpointError: The checkpoint does not have one.
        """
        taken: list[tuple[nn.Module, str, Parameter]] = []
        try:
            for part in _parts(module, but):
                for leaf, own in part._parameters.items():
                    if own is not None and own.is_meta:
                        taken.append((part, leaf, own))
                        part._parameters[leaf] = Parameter(self.tensor(part, leaf, own), requires_grad=False)
            yield
        finally:
            for part, leaf, own in taken:
                part._parameters[leaf] = own

    def tensor(self, module: nn.Module, leaf: str, own: Tensor) -> Tensor:
        """A weight in float32.

        Args:
            module: Of the model, that has it.
            leaf: Its name there.
            own: What stands there without values.

        Raises:
            CheckpointError: The checkpoint does not have it.
        """
        name = _WRAPPED.sub("", f"{self._names[id(module)]}.{leaf}")
        found = self._read[name]() if name in self._read else None
        if found is None or found.shape != own.shape:
            raise CheckpointError(
                f"`{self._label}` holds no `{name}` of the shape {list(own.shape)}, as its configuration says; a model "
                "that only transformers can put together is refined as a whole, by `distil`."
            )
        return found.to(self._device, torch.float32)


def _parts(module: nn.Module, but: Container[nn.Module]) -> Iterator[nn.Module]:
    if module not in but:
        yield module
        for child in module.children():
            yield from _parts(child, but)


def _stacked(checkpoint: Checkpoint, parts: Iterable[Iterable[str]]) -> Tensor:
    """A stack of experts, of what each is made of."""
    return torch.stack([torch.cat([checkpoint.read(name) for name in own]) for own in parts])
