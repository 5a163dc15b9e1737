"""A delta put into the layers that PEFT builds for it, by whatever call of PEFT's or of a library on top of it."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_posthoc.adapters.cast import cast
from peft_posthoc.adapters.experts import pack
from peft_posthoc.adapters.names import PREFIX
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import AdapterError
from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.delta import Pair, difference

START = "posthoc"
"""The `init_lora_weights` of a configuration with a delta. PEFT does not know it, and refuses a configuration that was
copied without its delta."""
# Modules that PEFT keeps whole by itself for a classifier or a question answerer.
_HEADS = ("classifier", "score", "qa_outputs")
# Weights, and values of each, that a live model is held against: those that the fine-tune changed most.
_WEIGHTS, _VALUES = 16, 64
# A share of the change's energy there; what is further from the base is told. Loading in another type gives less.
_OTHER = 0.01


@dataclasses.dataclass(frozen=True)
class Sample:
    """Values of a weight before and after, at the places where they differ most."""

    shape: torch.Size
    places: Tensor
    base: Tensor
    tuned: Tensor

    def values_in(self, module: nn.Module | None) -> Tensor | None:
        """Values of a live model's layer there; None where that is not to be seen: spread out, quantised, meta."""
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or weight.shape != self.shape:
            return None
        if weight.is_meta or not weight.is_floating_point():
            return None
        return weight.detach().reshape(-1)[self.places.to(weight.device)].cpu()


@dataclasses.dataclass(frozen=True)
class Delta:
    """Contents for the layers that PEFT builds."""

    adapter: Adapter
    biases: Mapping[str, Tensor]
    """For `lora_bias`: by module, tuned minus base."""
    whole: Mapping[str, Mapping[str, Tensor]]
    """For `modules_to_save`, and the heads that PEFT puts there itself: by module, the tuned parameters by name."""
    samples: Mapping[str, Sample]
    """By module, of its weight."""
    start: bool | str
    """PEFT's own start, of what the factors leave empty: `init_lora_weights` as it was asked for."""

    @classmethod
    def of(cls, adapter: Adapter, base: Checkpoint, tuned: Checkpoint, config: Any) -> Delta:
        """Read what the configuration wants beside the factors."""
        layout = adapter.plan.layout
        whole: dict[str, dict[str, Tensor]] = {}
        biases: dict[str, Tensor] = {}
        owner_of = {user: owner for owner, users in layout.ties.items() for user in users}
        modules = {layout.module_of(name): None for name in tuned.headers} | dict.fromkeys(owner_of)
        for module in modules:
            if f".{module}".endswith(tuple(f".{name}" for name in (*(config.modules_to_save or ()), *_HEADS))):
                stored = owner_of.get(module, module)
                whole[module] = {
                    name.rpartition(".")[2]: tuned.read(name)
                    for name in tuned.headers
                    if layout.module_of(name) == stored
                }
        if config.lora_bias:
            for weight in adapter.layers:
                name = weight.removesuffix("weight") + "bias"
                if name in base.headers and name in tuned.headers:
                    change = difference(Pair(name, base.read(name), tuned.read(name)).on(torch.device("cpu")))
                    biases[adapter.plan.carried[weight][0].module] = change.values
        return cls(adapter, biases, whole, dict(_samples(adapter, base, tuned)), config.init_lora_weights)

    def check(self, model: nn.Module) -> None:
        """See before PEFT changes a model that it is the base: by the values that the fine-tune changed most.

        Raises:
            AdapterError: It is the fine-tune already.
        """
        modules = {name.removeprefix(PREFIX): module for name, module in model.named_modules()}
        from_base = from_tuned = change = 0.0
        for name, sample in self.samples.items():
            values = sample.values_in(modules.get(name))
            if values is not None:
                base, tuned = (side.to(values.dtype).double() for side in (sample.base, sample.tuned))
                from_base += float((values.double() - base).square().sum())
                from_tuned += float((values.double() - tuned).square().sum())
                change += float((tuned - base).square().sum())
        base, tuned = self.adapter.provenance["base"], self.adapter.provenance["tuned"]
        if from_tuned < from_base:
            raise AdapterError(
                f"The model holds the weights of `{tuned}` already: the delta would be added twice. Give `{base}`."
            )
        if from_base > _OTHER * change:
            warnings.warn(
                f"The model does not hold the weights of `{base}`, from which the delta to `{tuned}` was taken: it is "
                "added to others.",
                stacklevel=2,
            )


def _samples(adapter: Adapter, base: Checkpoint, tuned: Checkpoint) -> Iterator[tuple[str, Sample]]:
    for weight in list(adapter.layers)[:: -(-len(adapter.layers) // _WEIGHTS)]:
        place = adapter.plan.carried[weight][0]
        if weight not in base.headers or weight not in tuned.headers or place.kind.stacked:
            continue
        before, after = base.read(weight), tuned.read(weight)
        if before.shape == after.shape:
            change = (after.double() - before.double()).abs().reshape(-1)
            places = change.topk(min(_VALUES, len(change))).indices
            yield place.module, Sample(before.shape, places, *(side.reshape(-1)[places] for side in (before, after)))


def fill_what_peft_builds() -> None:
    """From now on PEFT puts the delta of a configuration into the layers that it builds for it, or changes nothing.

    All ways to an adapter come through these two methods: PEFT's `get_peft_model` and `add_adapter`, transformers'
    `add_adapter`, TRL's `peft_config=`. What has no delta goes its usual way.
    """
    build, cast_to = BaseTuner.inject_adapter, BaseTuner._cast_adapter_dtype
    if hasattr(build, "fills"):
        return

    @functools.wraps(build)
    def inject_adapter(tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = tuner.peft_config[adapter_name]
        delta: Delta | None = getattr(config, "delta", None)
        if delta is None:
            if getattr(config, "init_lora_weights", None) == START:
                raise AdapterError(
                    "This configuration is a copy without the delta that it was made with, and would start from zero. "
                    "Give the one from `LoraConfig.from_delta`, or a `copy.deepcopy` of it."
                )
            build(tuner, model, adapter_name, *args, **kwargs)
            return
        if any(isinstance(module, LoraLayer) and adapter_name in module.scaling for module in model.modules()):
            raise AdapterError(f"The model has an adapter `{adapter_name}` already. Give this one another name.")
        delta.check(model)
        with _unchanged_on_error(tuner, model, adapter_name), plain_start(config):
            build(tuner, model, adapter_name, *args, **kwargs)
            fill(model, delta, adapter_name)
        tuner._unrounded = adapter_name

    @functools.wraps(cast_to)
    def _cast_adapter_dtype(tuner: BaseTuner, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        cast_to(tuner, adapter_name, *args, **kwargs)
        # The factors went into layers of the base's type, and PEFT has just made these wider: once more, unrounded.
        if tuner.__dict__.pop("_unrounded", None) == adapter_name:
            fill(tuner.model, tuner.peft_config[adapter_name].delta, adapter_name)

    inject_adapter.fills = True  # type: ignore[attr-defined]
    BaseTuner.inject_adapter, BaseTuner._cast_adapter_dtype = inject_adapter, _cast_adapter_dtype


@contextmanager
def plain_start(config: Any) -> Iterator[None]:
    """Let a configuration with a delta be, in the `with` block, one that stock PEFT knows."""
    before = config.init_lora_weights
    delta = getattr(config, "delta", None)
    config.init_lora_weights = before if delta is None or before != START else delta.start
    try:
        yield
    finally:
        config.init_lora_weights = before


@contextmanager
def _unchanged_on_error(tuner: BaseTuner, model: nn.Module, adapter_name: str) -> Iterator[None]:
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wrappers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)]
    active = [(wrapper, [*wrapper.active_adapters]) for wrapper in wrappers]
    try:
        yield
    except Exception:
        if tuner.peft_config.keys() - {adapter_name}:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT says which adapter it makes the active one.
                tuner.delete_adapter(adapter_name)
        else:
            tuner.unload()
        for wrapper, names in active:
            wrapper.set_adapter(names)
        for parameter, trains in trained:
            parameter.requires_grad = trains
        raise


@torch.no_grad()
def fill(model: nn.Module, delta: Delta, adapter_name: str) -> None:
    """Put the factors where PEFT has made room for them."""
    unplaced = set(delta.adapter.factors)
    for name, module in model.named_modules():
        name = name.removeprefix(PREFIX)
        if isinstance(module, ParamWrapper) and adapter_name in module.scaling:
            unplaced -= _fill_experts(name, module, adapter_name, delta)
        elif isinstance(module, LoraLayer) and adapter_name in module.scaling:
            a, b = delta.adapter.factors.get(name, (None, None))
            if a is None and name not in delta.adapter.plan.slots:
                raise AdapterError(f"The model has an adapted layer `{name}` that the checkpoints do not have.")
            _fill_layer(name, module, adapter_name, a, b, delta.biases.get(name))
            unplaced.discard(name)
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            unplaced -= {name} & delta.whole.keys()
            for parameter, value in delta.whole.get(name, {}).items():
                _copy(getattr(module.modules_to_save[adapter_name], parameter), value, f"{name}.{parameter}")
    if unplaced:
        raise AdapterError(
            f"The model has no layer for {len(unplaced)} of the factors: {', '.join(sorted(unplaced)[:5])}."
        )


def _fill_experts(name: str, wrapper: ParamWrapper, adapter_name: str, delta: Delta) -> set[str]:
    """Put the factors of stacked experts into PEFT's wrapper of their parameter.

    Returns:
        Those that found their place.
    """
    parameter = f"{name.replace('.base_layer', '')}.{wrapper.parameter_name}"
    stack = next((stack for stack in delta.adapter.plan.layout.stacks if stack.name == parameter), None)
    if stack is None:
        raise AdapterError(f"The model has an adapted parameter `{parameter}` that is no stack of experts.")
    into_a, into_b = wrapper.lora_A[adapter_name].weight, wrapper.lora_B[adapter_name].weight
    if into_a.is_meta:
        raise AdapterError(f"`low_cpu_mem_usage` leaves the factors of `{parameter}` without values. Leave it out.")
    scale = wrapper.scaling[adapter_name]
    factors = {unit: (a, b / scale) for unit, (a, b) in delta.adapter.factors.items() if unit in stack.units}
    a, b = pack(stack, factors, wrapper.r[adapter_name], into_a.dtype)
    _copy(into_a, a, parameter)
    _copy(into_b, b, parameter)
    return set(stack.units)


def _fill_layer(
    name: str, layer: LoraLayer, adapter_name: str, a: Tensor | None, b: Tensor | None, bias: Tensor | None
) -> None:
    embedding = adapter_name in layer.lora_embedding_A
    if embedding:
        into_a, into_b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    else:
        into_a, into_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if into_a.is_meta:
        into_a, into_b = _materialize(layer, adapter_name, embedding=embedding)
    # What the factors leave empty of `A` keeps PEFT's start, and of `B` is zero: no effect, but a gradient.
    into_b.zero_()
    if a is not None and b is not None:
        scale = layer.scaling[adapter_name]
        if into_a.shape[0] < len(a):
            raise AdapterError(f"The model gives `{name}` rank {into_a.shape[0]}, but {len(a)} were extracted.")
        a, b = cast(a, b / scale, into_a.dtype, name)
        # A convolution's have its kernel behind the two sides of the matrix.
        _copy(into_a[: len(a)], a.reshape(len(a), -1, *into_a.shape[2:]), name)
        _copy(into_b[:, : len(a)], b.reshape(*b.shape, *into_b.shape[2:]), name)
    if bias is not None and not embedding:
        _copy(layer.lora_B[adapter_name].bias, bias / layer.scaling[adapter_name], f"{name}.bias")
    if layer.use_dora.get(adapter_name):
        # DoRA scales every row to a magnitude: that of base + b @ a makes it the plain sum.
        layer.lora_magnitude_vector[adapter_name].update_layer(
            base_layer=layer.get_base_layer(), lora_A=into_a, lora_B=into_b, scaling=layer.scaling[adapter_name]
        )


def _materialize(layer: LoraLayer, adapter_name: str, *, embedding: bool) -> tuple[Tensor, Tensor]:
    """Make real the factors that `low_cpu_mem_usage` left on the meta device."""
    device = layer.get_base_layer().weight.device
    if embedding:
        for factors in (layer.lora_embedding_A, layer.lora_embedding_B):
            factors[adapter_name] = nn.Parameter(torch.zeros_like(factors[adapter_name], device=device))
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    for factors in (layer.lora_A, layer.lora_B):
        factors[adapter_name].to_empty(device=device)
    nn.init.kaiming_uniform_(layer.lora_A[adapter_name].weight, a=5**0.5)
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight


def _copy(into: Tensor, value: Tensor, name: str) -> None:
    if into.shape != value.shape:
        raise AdapterError(
            f"`{name}` has shape {list(into.shape)} in the model, {list(value.shape)} in the checkpoints."
        )
    into.copy_(value)
