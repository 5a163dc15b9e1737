"""Where the tensors of an adapter's file arrive when PEFT loads it: asked of the installed PEFT, without a weight."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_posthoc.checkpoints.checkpoint import Header

_NAME = "default"
"""What PEFT calls an adapter that has no name."""


@dataclass(frozen=True)
class Arrivals:
    """What PEFT does with the tensors of an adapter's file."""

    parameters: Mapping[str, tuple[str, ...]]
    """By tensor of the file, the parameters of PEFT's model that it arrives in; none where PEFT drops it."""
    empty: tuple[str, ...] = ()
    """Parameters that PEFT made for the adapter, and that nothing arrives in."""
    misfits: tuple[str, ...] = ()
    """Tensors of another shape than the parameter that they are for: PEFT ends with a RuntimeError."""
    absent: tuple[str, ...] = ()
    """Tensors that PEFT takes out of the file for modules kept whole, and that are not there or were taken already: it
    ends with a KeyError."""
    refused: tuple[str, ...] = ()
    """Modules that PEFT does not keep whole: a list of parameters, one that cannot be copied."""
    error: str = ""
    """What PEFT raises, where it does not come to put tensors into the model."""

    @property
    def lost(self) -> list[str]:
        """The tensors that PEFT drops."""
        return [name for name, parameters in self.parameters.items() if not parameters]


def ask(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Header]) -> Arrivals:
    """Let PEFT load an adapter into a model, both on the meta device.

    Args:
        model: Without values, as `build` makes it. PEFT changes it.
        config: The adapter's configuration.
        tensors: What is in the adapter's file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = _wrapped(model, config)
        except Exception as error:  # PEFT has no class for what it refuses.
            refused = tuple(_refused(model, config.get("modules_to_save") or ()))
            return Arrivals(dict.fromkeys(tensors, ()), refused=refused, error=f"{type(error).__name__}: {error}")
        wanted = Counter(_taken(wrapped))
        if absent := tuple(name for name, times in wanted.items() if times > 1 or name not in tensors):
            return Arrivals(dict.fromkeys(tensors, ()), absent=absent, error=f"KeyError: {absent[0]!r}")
        state = {name: torch.empty(header.shape, dtype=header.dtype, device="meta") for name, header in tensors.items()}
        with _Origins(state) as origins:
            arrived_in = loaded(wrapped, state)
    own = wrapped.state_dict()
    arrived: dict[str, list[str]] = {name: [] for name in tensors}
    misfits = []
    for parameter, tensor in arrived_in.items():
        sources = origins.of(tensor)
        if parameter in own and own[parameter].shape == tensor.shape:
            for name in sources:
                arrived[name].append(parameter)
        elif parameter in own:
            misfits += sources
    made = [name for name in own if ".lora_" in name or f".modules_to_save.{_NAME}." in name]
    return Arrivals(
        {name: tuple(parameters) for name, parameters in arrived.items()},
        tuple(name for name in made if name not in arrived_in),
        tuple(misfits),
    )


def loaded(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT would put into the parameters of its model, of the tensors of an adapter's file."""
    import peft

    found: dict[str, Tensor] = {}
    with _captured(model, found):
        peft.set_peft_model_state_dict(model, dict(tensors), low_cpu_mem_usage=True)
    return found


def _wrapped(model: nn.Module, config: Mapping[str, Any]) -> Any:
    """The model with the adapter in it, as `PeftModel.from_pretrained` makes it before it loads tensors."""
    import peft

    # How factors start does not matter: it may need values of the base.
    plain = {**config, "peft_type": "LORA", "init_lora_weights": True, "inference_mode": True}
    made = peft.LoraConfig.from_peft_type(**copy.deepcopy(plain))
    of_task = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(made.task_type, peft.PeftModel)
    return of_task(model, made, _NAME, low_cpu_mem_usage=True)


def _refused(model: nn.Module, modules: Iterable[str]) -> Iterator[str]:
    """The modules that PEFT does not keep whole, whatever else is in the adapter."""
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    for name, module in model.named_modules():
        if name.endswith(tuple(modules)) and not isinstance(module, AuxiliaryTrainingWrapper):
            try:
                ModulesToSaveWrapper(module, _NAME)
            except Exception:  # PEFT has no class for what it refuses.
                yield name


def _taken(model: nn.Module) -> Iterator[str]:
    """The tensors of modules kept whole that PEFT takes out of the file."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield from (f"{name}.{key}" for key in module.adapter_state_dict_load_map(_NAME))


@contextmanager
def _captured(model: nn.Module, loaded: dict[str, Tensor]) -> Iterator[None]:
    """Keep what PEFT would load into the model, by its parameter."""

    def load(state: Mapping[str, Tensor], **_: Any) -> Any:
        loaded.update(state)
        return nn.modules.module._IncompatibleKeys([], [])

    model.load_state_dict = load  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del model.load_state_dict


class _Origins(TorchDispatchMode):
    """Of every tensor made from others, the names of those."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # With the tensor itself: its id is then no other's.
        self._known: dict[int, tuple[Tensor, tuple[str, ...]]] = {
            id(tensor): (tensor, (name,)) for name, tensor in named.items()
        }

    def of(self, tensor: Tensor) -> tuple[str, ...]:
        """The names of the tensors that it was made from."""
        return self._known.get(id(tensor), (tensor, ()))[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what is asked, and keep from what."""
        made = func(*args, **(kwargs or {}))
        sources = dict.fromkeys(
            name for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) for name in self.of(one)
        )
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and id(one) not in self._known:
                self._known[id(one)] = (one, tuple(sources))
        return made
