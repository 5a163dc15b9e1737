"""DeepSpeed's ZeRO-3 without gathered saves: its checkpoints are pickles, so weights are taken from the live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_callbacks.pin import remade
from peft_posthoc.checkpoints.checkpoint import once

_WHOLE = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


def saves_partitions(args: Any) -> bool:
    """Tell whether a run's checkpoints hold DeepSpeed's partitions in place of weights. The same on every process."""
    config = getattr(args, "hf_deepspeed_config", None)
    return config is not None and config.is_zero3() and not config.get_value(_WHOLE, False)


def is_partitioned(model: nn.Module) -> bool:
    """Tell whether ZeRO-3 has spread the weights over the processes. The same on every process."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def is_sharded(model: nn.Module) -> bool:
    """Tell whether FSDP or tensor parallelism has."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def trains_adapter(model: nn.Module) -> bool:
    """Tell whether a model is PEFT's, or has an adapter of PEFT's in it. The same on every process."""
    return hasattr(model, "peft_config") or bool(getattr(model, "_hf_peft_config_loaded", False))


def gather(model: nn.Module, to: Path | None) -> None:
    """Save a model that ZeRO-3 has spread over the processes, as `save_pretrained` saves one that is whole.

    A collective: every process must call this at the same point of the training. One weight at a time is brought
    together; the first process holds all of them in its main memory until they are written.

    Args:
        model: The live model.
        to: On the process that saves it the new folder; None on the others.

    Raises:
        AdapterError: It cannot be written.
        RuntimeError: There is not enough memory to hold it.
    """
    from deepspeed import zero

    model = getattr(model, "_orig_mod", model)
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    copies: dict[int, Tensor] = {}
    failure: Exception | None = None
    for tensor in {id(tensor): tensor for tensor in state.values()}.values():  # a tied weight once
        with zero.GatheredParameters([tensor]):
            if to is not None and failure is None:
                try:
                    copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
                except (RuntimeError, MemoryError) as error:
                    # The other processes wait for this one at every weight that is left.
                    failure = error
                    copies.clear()
    if failure is not None:
        raise RuntimeError(f"the model's weights could not be held in memory: {failure}") from failure
    if to is None:
        return
    held = {name: copies[id(tensor)] for name, tensor in state.items()}
    save: Any = getattr(model, "save_pretrained", None)
    with remade(to, what="The live model's weights") as half:
        if callable(save):
            save(half, state_dict=held)
        else:
            save_file(once(held), half / "model.safetensors")
