"""Adapters as they lie on disk, read one module at a time: modules, their factors, and tensors kept whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import widest
from peft_posthoc.adapters.config import CONFIG, PICKLE, WEIGHTS, read_config
from peft_posthoc.adapters.factors import Factors
from peft_posthoc.adapters.module import Kind, Module
from peft_posthoc.adapters.names import PREFIX
from peft_posthoc.adapters.plain import not_plain
from peft_posthoc.adapters.scale import parameters_of, settings
from peft_posthoc.adapters.tensors import Factored, factored, is_whole
from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.folder import File
from peft_posthoc.errors import AdapterError, CheckpointError


class AdapterFile(Protocol):
    """An adapter in any format: what it adds to the modules of a model, and what takes the place of its tensors."""

    label: str
    """Its name in messages."""
    place: Path
    config: Mapping[str, Any]
    """In PEFT's words."""
    modules: Mapping[str, Module]
    """The modules with factors, by the model's names."""
    whole: tuple[str, ...]
    """Names of the tensors that take the place of the base's: the model's, behind PEFT's prefix."""
    added: Mapping[str, str]
    """By the model's names of tensors, the file's name of what is added to each beside any factors."""
    headers: Mapping[str, Header]
    files: tuple[Path, ...]
    """Those that it is read from."""

    def factors(self, module: str) -> list[Factors]:
        """The factors of each of a module's deltas, their scale folded into `b`, in float64."""

    def bias(self, module: str) -> Tensor | None:
        """The summand of a module's bias, the scale folded in, in float64; None where LoRA has none."""

    def tensor(self, name: str) -> Tensor:
        """A tensor that is kept whole, as it is in the file."""

    def dtype(self) -> torch.dtype:
        """The widest type of the factors."""


class LoraFolder:
    """A PEFT LoRA folder; its tensors stay on disk until they are asked for.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        AdapterError: It cannot be read, PEFT would not load it, or what it adds to the weights is not the product of
            its factors alone.
    """

    added: Mapping[str, str] = MappingProxyType({})

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.label = str(folder)
        where = Path(folder)
        self.place = where.absolute()
        self.files: tuple[Path, ...] = (where / CONFIG, where / WEIGHTS)
        if not (where / WEIGHTS).exists() and (where / PICKLE).is_file():
            raise AdapterError(
                f"`{where}` holds a pickle, `{PICKLE}`, which is not executed here. Load it with PEFT where you trust "
                "it, and save it again: that writes safetensors."
            )
        self.config: Mapping[str, Any] = read_config(where)
        if (why := not_plain(self.config)) is not None:
            raise AdapterError(f"`{where}` is no plain LoRA delta: {why}.")
        try:
            self._file: Checkpoint = File(where / WEIGHTS, label=self.label)
        except CheckpointError as error:
            raise AdapterError(f"`{where}` is not a readable LoRA adapter: {str(error).removesuffix('.')}.") from error
        self._sort(self._file.headers)

    def _sort(self, headers: Mapping[str, Header]) -> None:
        """Sort the file's tensors into modules with factors and what is kept whole."""
        self.headers = headers
        self.modules: Mapping[str, Module] = {module.name: module for module in self._modules()}
        taken = {key for module in self.modules.values() for key in module.tensor_names()}
        taken |= {module.bias_name for module in self.modules.values() if module.bias}
        self.whole = tuple(name for name in self.headers if name not in taken)
        strangers = [name for name in self.whole if not is_whole(name, self.config, self.modules)]
        if strangers or not self.modules:
            what = f"tensors that are no LoRA factors: {', '.join(strangers[:5])}" if strangers else "no LoRA factors"
            raise AdapterError(f"`{self.label}` holds {what}.")

    def factors(self, module: str) -> list[Factors]:
        """The factors of each of a module's deltas, their scale folded into `b`, in float64."""
        found = self.modules[module]
        a, b = (self._file.read(key).double() for key in found.tensor_names())
        return [Factors(one.a, one.b * found.scale) for one in found.split(a, b)]

    def bias(self, module: str) -> Tensor | None:
        """The summand of a module's bias, the scale folded in, in float64; None where LoRA has none."""
        found = self.modules[module]
        return self._file.read(found.bias_name).double() * found.scale if found.bias else None

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is in the file."""
        return self._file.read(name)

    def dtype(self) -> torch.dtype:
        """The widest type of the factors."""
        return widest(self.headers[key].dtype for module in self.modules.values() for key in module.tensor_names())

    def _modules(self) -> Iterator[Module]:
        found = {
            module: own
            for module, own in factored(self.headers, self.label).items()
            # PEFT ignores factors of other names in silence.
            if {own.a_name, own.b_name} == {f"{PREFIX}{module}.{key}" for key in (own.kind.a_key, own.kind.b_key)}
        }
        parameters = {module: parameters_of(module, self.config) for module in found}
        scaled = settings(self.config, [one for own in found for one in parameters[own] or [own]], self.label)
        for module, own in found.items():
            wanted = {scaled[one] for one in parameters[module] or [module]}
            if len(wanted) > 1:
                raise AdapterError(
                    f"`{self.label}` gives the parameters of `{module}` different ranks or scales by a pattern; which "
                    "of its tensors belong to which only the model can tell."
                )
            ((rank, scale),) = wanted
            kind = _kind(own, parameters[module])
            experts = own.rank // rank if kind == "experts" else 1
            if own.rank != rank * experts or not experts:
                raise AdapterError(
                    f"`{self.label}` holds factors of shapes {list(own.a_shape)} and {list(own.b_shape)} for "
                    f"`{module}`, and not of rank {rank}, as its configuration says: PEFT does not load it."
                )
            yield Module(module, kind, rank, scale, own, experts, f"{PREFIX}{module}.lora_B.bias" in self.headers)


def _kind(own: Factored, parameters: list[str]) -> Kind:
    if own.kind.transposed:
        return "embedding"
    if parameters:
        return "experts"
    return "convolution" if len(own.a_shape) > 2 else "linear"
