"""The factors of an adapter on a live model, to be moved; everything else of the model stays as it is found."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from peft_posthoc.adapters.arrivals import ask
from peft_posthoc.adapters.cast import cast, widest
from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.errors import AdapterError
from peft_posthoc.models.by_class import build

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
# What PEFT and PyTorch keep in modules of how they are used.
_MODES = ("training", "active_adapter", "_active_adapter", "_disable_adapters")


@contextmanager
def as_found(*models: Any) -> Iterator[None]:
    """Leave models as they were found: modes, active adapters, what is trained, and gradients."""
    modes = [
        (vars(module), {key: copy.copy(vars(module)[key]) for key in _MODES if key in vars(module)})
        for model in models
        for module in model.modules()
    ]
    trained = [(own, own.requires_grad, own.grad) for model in models for own in model.parameters()]
    try:
        yield
    finally:
        for own, mode in modes:
            own.update(mode)
        for parameter, requires_grad, grad in trained:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def factors_of(model: Any, name: str, file: AdapterFile) -> dict[str, Parameter]:
    """The factors of an adapter on a PEFT model, by their names in the adapter's file.

    Args:
        model: PEFT's.
        name: The adapter's on the model.
        file: The adapter's.

    Raises:
        AdapterError: The model does not hold one as the file does.
    """
    own = {_without(name, parameter): factor for parameter, factor in model.named_parameters()}
    wanted = [factor for module in file.modules.values() for factor in module.tensor_names()]
    arrived: Mapping[str, tuple[str, ...]] = {}
    if any(factor not in own for factor in wanted):  # PEFT renames some as it loads them.
        base = model.get_base_model()
        built = build({**base.config.to_dict(), "architectures": [type(base).__name__]})
        arrived = {} if built is None else ask(built, file.config, file.headers).parameters
    found = {}
    for factor in wanted:
        places = [factor] if factor in own else [_without("default", one) for one in arrived.get(factor, ())]
        if len(places) != 1 or places[0] not in own or own[places[0]].shape != file.headers[factor].shape:
            raise AdapterError(f"PEFT does not hold `{factor}` of `{file.label}` as the file does; it is not refined.")
        found[factor] = own[places[0]]
    return found


def _without(adapter: str, parameter: str) -> str:
    """The name of a parameter without the adapter's, as it is in a file."""
    parts = parameter.split(".")
    at = [i + 1 for i, part in enumerate(parts[:-1]) if part in _FACTORS and parts[i + 1] == adapter]
    return ".".join(part for i, part in enumerate(parts) if i not in at)


@contextmanager
def movable(model: Any, factors: Mapping[str, Parameter]) -> Iterator[None]:
    """The factors in float32, with gradients, and nothing else with any.

    Afterwards they are in their own types and places again, with the values that they were given; with those that they
    had, if something went wrong.
    """
    before = {name: own.data for name, own in factors.items()}
    try:
        for own in model.parameters():
            own.requires_grad_(False)
        for own in factors.values():
            own.grad = None
            own.data = own.data.to(torch.float32, copy=True)
            own.requires_grad_(True)
        yield
        for name, own in factors.items():
            before[name].copy_(own.data)
    finally:
        for name, own in factors.items():
            own.grad = None
            own.data = before[name]


def rounded(file: AdapterFile, factors: Mapping[str, Parameter], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors as they are now, in the types and shapes of the file."""
    found: dict[str, Tensor] = {}
    for module in file.modules.values():
        a, b = module.tensor_names()
        wide = widest((stored[a].dtype, stored[b].dtype))
        parts = module.split(factors[a].detach().cpu(), factors[b].detach().cpu())
        joined = module.join([cast(part.a, part.b, wide, module.name) for part in parts])
        found |= {name: x.to(stored[name].dtype).reshape(stored[name].shape) for name, x in joined.items()}
    return found
