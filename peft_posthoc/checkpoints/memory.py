"""Checkpoints that are state dicts or live modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header, once
from peft_posthoc.errors import CheckpointError


class InMemory(Checkpoint):
    """Tensors that are already there: a state dict or a module's."""

    def __init__(self, tensors: Mapping[str, Tensor], *, label: str, module: nn.Module | None = None) -> None:
        self.label = label
        self.module = module
        self._tensors = once({name: tensor.detach() for name, tensor in tensors.items()})
        self.headers = {name: Header(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}
        to_dict = getattr(getattr(module, "config", None), "to_dict", None)
        self.config: Mapping[str, Any] | None = to_dict() if callable(to_dict) else None

    def read(self, name: str) -> Tensor:
        """The tensor itself, not a copy.

        Raises:
            CheckpointError: The tensor lies on the meta device and has no values.
        """
        tensor = self._tensors[name]
        if tensor.is_meta:
            raise CheckpointError(
                f"`{name}` of the {self.label} is on the meta device and has no values. Load the whole model into "
                "memory, or give its folder."
            )
        return tensor


def of_bitsandbytes(module: nn.Module) -> bool:
    """Tell whether a module is one of bitsandbytes', whose weight is codes."""
    return type(module).__module__.partition(".")[0] == "bitsandbytes"


def of_module(module: nn.Module) -> InMemory:
    """A live module as a checkpoint.

    Raises:
        CheckpointError: The module carries a PEFT adapter already.
    """
    if hasattr(module, "peft_config"):
        raise CheckpointError(
            f"The {type(module).__name__} already carries a PEFT adapter. Call `merge_and_unload()` or `unload()` "
            "on it and give the plain model."
        )
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    kept = module.state_dict(keep_vars=True)
    tensors |= {name: buffer for name, buffer in module.named_buffers() if name in kept}
    # Those keep what decodes their weights beside them, as they save it.
    coded = tuple(f"{name}." for name, part in module.named_modules() if of_bitsandbytes(part))
    tensors |= {name: value for name, value in kept.items() if name.startswith(coded) and isinstance(value, Tensor)}
    return InMemory(tensors, label=loaded_from(module) or type(module).__name__, module=module)


def loaded_from(module: object) -> str | None:
    """The folder or hub id that a live model of transformers says it was loaded from; None if it says none."""
    return getattr(getattr(module, "config", None), "_name_or_path", None) or None
