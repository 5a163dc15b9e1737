"""The PEFT surface: `LoraConfig.from_delta` and `get_peft_model(..., init="posthoc")`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_posthoc.adapters.cast import cast
from peft_posthoc.adapters.experts import pack
from peft_posthoc.adapters.names import PREFIX
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import AdapterError
from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.delta import Pair, difference
from peft_posthoc.extraction.extract import extract
from peft_posthoc.extraction.plan import by_flags
from peft_posthoc.extraction.reasons import LeftOut, told
from peft_posthoc.models.layout import Place
from peft_posthoc.ranks.rules import Rank
from peft_posthoc.ranks.safe import safe_rank
from peft_posthoc.sources import Source, open_pair

# These change what a LoRA layer computes, or the base weights, so that factors of a delta would mean something else.
_NOT_A_DELTA = (
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")


class LoraConfig(peft.LoraConfig):  # type: ignore[misc]
    """PEFT's `LoraConfig`, which can also be made from two checkpoints. What it saves is plain PEFT."""

    delta: Delta | None = None
    """What `from_delta` found. No dataclass field: it is not part of the saved configuration."""

    @classmethod
    def from_delta(
        cls,
        base: Source,
        tuned: Source,
        r: Rank = 8,
        *,
        base_revision: str | None = None,
        tuned_revision: str | None = None,
        exact: bool = False,
        device: str = "cpu",
        progress: bool = False,
        **fields: Any,
    ) -> Self:
        """Extract LoRA factors from the difference of two models, and the configuration that goes with them.

        Args:
            base: The model before: a folder, a file, a hub id, a module or a state dict.
            tuned: The same model after any kind of full fine-tuning.
            r: An int is a rank; a float in (0, 1] is the share of every delta's energy to keep, or any other rule that
                `extract` takes as its `rank`. `r` becomes the largest rank that this needs, rounded up to one that
                every engine scales alike (8, or a multiple of 16).
            base_revision: Branch, tag or commit, where `base` is a hub id.
            tuned_revision: The same for `tuned`.
            exact: Use LAPACK's full SVD for every weight.
            device: Where to factor.
            progress: Show a progress bar on stderr.
            **fields: Any field of `peft.LoraConfig`. `target_modules`, `exclude_modules`, `layers_to_transform` and
                `rank_pattern` choose what is extracted (by default every linear layer but the head),
                `target_parameters` stacked experts beside it. `modules_to_save` get the tuned model's weights. The
                scale of `lora_alpha` (by default `r`), `alpha_pattern` and `use_rslora` is divided out of the factors,
                so that the layers add the delta whatever it is.

        Raises:
            CheckpointError: A checkpoint cannot be read.
            MismatchError: The two are not states of one model.
            NothingToCarryError: Nothing changed that these modules can carry.
            ValueError: A field asks for something that is not a plain LoRA.
        """
        strange = [name for name in _NOT_A_DELTA if fields.get(name)]
        init = fields.get("init_lora_weights", True)
        if strange or not any(init is plain or (isinstance(init, str) and init == plain) for plain in _PLAIN_INITS):
            what = ", ".join(f"`{name}`" for name in strange) or f"`init_lora_weights={init!r}`"
            raise ValueError(
                f"`from_delta` cannot honour {what}: its layers would not compute base + b @ a. Leave it out."
            )
        before, after = open_pair(base, tuned, base_revision=base_revision, tuned_revision=tuned_revision)
        asked = cls(r=r if isinstance(r, int) else 1, **fields)
        adapter = extract(
            before,
            after,
            r,
            choose=lambda places: _choose(asked, places),
            rank_pattern=asked.rank_pattern,
            experts="fused" if asked.target_parameters else "none",
            exact=exact,
            device=device,
            progress=progress,
        )
        if asked.target_parameters and not any(adapter.plan.slots[module].kind.stacked for module in adapter.factors):
            raise ValueError(
                f"`target_parameters={sorted(asked.target_parameters)}` names no stacked experts that changed."
            )
        rank = r if isinstance(r, int) else safe_rank(adapter.rank)
        fields.setdefault("lora_alpha", rank)
        fields.setdefault("task_type", adapter.plan.layout.task_type)
        fields["fan_in_fan_out"] = fields.get("fan_in_fan_out") or adapter.plan.layout.fan_in_fan_out
        if fields.get("target_modules") in (None, "all-linear"):
            fields["target_modules"] = adapter.file.target_modules
        config = cls(r=rank, **fields)
        config.delta = Delta.of(adapter, before, after, config)
        return config


@dataclasses.dataclass(frozen=True)
class Delta:
    """What `get_peft_model(init="posthoc")` puts into a model."""

    adapter: Adapter
    biases: Mapping[str, Tensor]
    """For `lora_bias`: by module, tuned minus base."""
    whole: Mapping[str, Mapping[str, Tensor]]
    """For `modules_to_save`: by module, the tuned parameters by name."""

    @classmethod
    def of(cls, adapter: Adapter, base: Checkpoint, tuned: Checkpoint, config: LoraConfig) -> Delta:
        """Read what the configuration wants beside the factors."""
        layout = adapter.plan.layout
        whole: dict[str, dict[str, Tensor]] = {}
        biases: dict[str, Tensor] = {}
        owner_of = {user: owner for owner, users in layout.ties.items() for user in users}
        modules = {layout.module_of(name): None for name in tuned.headers} | dict.fromkeys(owner_of)
        for module in modules:
            if any(module == name or module.endswith(f".{name}") for name in config.modules_to_save or ()):
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
                    change = difference(Pair(name, base.read(name), tuned.read(name)))
                    biases[adapter.plan.carried[weight][0].module] = change.values
        return cls(adapter, biases, whole)


def _choose(config: LoraConfig, places: Sequence[Place]) -> tuple[Place, ...] | LeftOut:
    """The places that PEFT would adapt with this configuration."""
    if places[0].kind.stacked:
        if any(f".{places[0].parameter}".endswith(f".{end}") for end in config.target_parameters or ()):
            return tuple(places)
        return told("not among the parameters that the configuration targets")
    automatic = config.target_modules is None or config.target_modules == "all-linear"
    candidates = by_flags()(places) if automatic else tuple(places)
    if isinstance(candidates, LeftOut):
        return candidates

    def wanted(place: Place) -> bool:
        leaf = place.module.rpartition(".")[2]
        probe = dataclasses.replace(config, target_modules=[leaf]) if automatic else config
        return bool(check_target_module_exists(probe, place.module))

    chosen = tuple(place for place in candidates if wanted(place))
    return chosen or told("not among the modules that the configuration targets")


def get_peft_model(
    model: nn.Module,
    peft_config: peft.PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    init: Literal["posthoc"] | None = None,
    tuned: Source | None = None,
) -> peft.PeftModel:
    """PEFT's `get_peft_model`, which can also start the adapter from a delta.

    Args:
        model: The base model. Its weights are not changed.
        peft_config: As in PEFT. With `init="posthoc"`, one from `LoraConfig.from_delta`, or any LoRA configuration
            together with `tuned`.
        adapter_name: As in PEFT.
        mixed: As in PEFT.
        autocast_adapter_dtype: As in PEFT.
        revision: As in PEFT.
        low_cpu_mem_usage: As in PEFT.
        init: None for PEFT's own initialization; `"posthoc"` for the extracted factors.
        tuned: The fine-tune to extract from, with `model` as its base.

    Returns:
        A `peft.PeftModel`. Capacity beyond the extracted rank keeps PEFT's start: zero in effect, but trainable.

    Raises:
        AdapterError: The factors do not fit the model.
        ValueError: `init` is unknown, or there is nothing to start from.
    """
    own = (mixed, autocast_adapter_dtype, revision, low_cpu_mem_usage)
    if init is None:
        if tuned is not None:
            raise ValueError('`tuned=` needs `init="posthoc"`.')
        return _peft_get_peft_model(model, peft_config, adapter_name, *own)
    if init != "posthoc":
        raise ValueError(f'`init` must be None or "posthoc". Got {init!r}.')
    if tuned is not None:
        if not isinstance(peft_config, peft.LoraConfig):
            raise ValueError(f"Only a LoRA configuration can hold a delta. Got {type(peft_config).__name__}.")
        fields = {f.name: getattr(peft_config, f.name) for f in dataclasses.fields(peft_config) if f.init}
        peft_config = LoraConfig.from_delta(model, tuned, **fields)
    delta = getattr(peft_config, "delta", None)
    if delta is None:
        raise ValueError('`init="posthoc"` needs a configuration made by `LoraConfig.from_delta`, or `tuned=`.')
    result = _peft_get_peft_model(model, peft_config, adapter_name, *own)
    _fill(result, delta, adapter_name)
    return result


_peft_get_peft_model = peft.get_peft_model


@torch.no_grad()
def _fill(model: nn.Module, delta: Delta, adapter_name: str) -> None:
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


def patch_peft() -> None:
    """Put `from_delta` on `peft.LoraConfig` and `init=` on `peft.get_peft_model`, for those who want these names."""
    peft.LoraConfig.from_delta = LoraConfig.from_delta
    peft.get_peft_model = get_peft_model
