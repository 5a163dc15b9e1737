"""Results of mergekit's graph as a checkpoint: each tensor is made when it is read, and forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Executor, Task
from mergekit.options import MergeOptions
from torch import Tensor
from transformers import set_seed

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.errors import CheckpointError


class Taken(Task[Tensor | None], frozen=True):  # type: ignore[misc, call-arg]
    """A value of the graph: a tensor, or that of one model among the inputs of a weight."""

    name: str
    source: Task
    model: ModelReference | None = None
    dtype: str | None = None

    def arguments(self) -> dict[str, Task]:
        """The task that it is taken from."""
        return {"value": self.source}

    def group_label(self) -> str | None:
        """The source's: mergekit goes through its graph in the order of these."""
        label: str | None = self.source.group_label()
        return label

    def execute(self, value: Any) -> Tensor | None:
        """The tensor."""
        tensor: Tensor | None = value if self.model is None else value.get(self.model)
        wanted = dtype_from_name(self.dtype)
        return tensor if tensor is None or wanted is None else tensor.to(wanted)


class Stream(Checkpoint):
    """A checkpoint (`peft_posthoc.Checkpoint`) that mergekit makes, in its own order, as it is read.

    Args:
        targets: One for each tensor.
        headers: What they will be, by name.
        options: mergekit's.
        label: What messages call it.
        config: The model's configuration.
        beside: What mergekit does not make, and is read from where it is.
    """

    sequential = True

    def __init__(
        self,
        targets: Sequence[Taken],
        headers: Mapping[str, Header],
        options: MergeOptions,
        *,
        label: str,
        config: Mapping[str, Any] | None,
        beside: Mapping[str, Checkpoint],
    ) -> None:
        self.label, self.config = label, config
        self._options = options
        self._executor = Executor(targets, math_device=options.device, storage_device="cpu")
        order = [handle.task().name for handle in self._executor.schedule.tasks if isinstance(handle.task(), Taken)]
        self._beside = beside
        self.headers = {name: headers[name] for name in order}
        self.headers |= {name: checkpoint.headers[name] for name, checkpoint in beside.items()}
        self._running: Iterator[tuple[Taken, Tensor | None]] | None = None
        self._ahead: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """The tensor of that name; each can be read once.

        Raises:
            CheckpointError: The merge gives no such tensor.
        """
        if name in self._beside:
            return self._beside[name].read(name)
        while name not in self._ahead:
            task, tensor = self._next(name)
            if tensor is None:
                raise CheckpointError(f"The {self.label} has no value for `{task.name}`.")
            self._ahead[task.name] = tensor
        return self._ahead.pop(name)

    def _next(self, name: str) -> tuple[Taken, Tensor | None]:
        if self._running is None:
            if self._options.random_seed is not None:
                set_seed(self._options.random_seed)
            self._running = self._executor.run(quiet=True)
        with torch.no_grad():
            found: tuple[Taken, Tensor | None] | None = next(self._running, None)
        if found is None:
            raise CheckpointError(f"`{name}` of the {self.label} was read before; it is made once only.")
        return found


def aligned(inputs: Task, options: MergeOptions) -> dict[ModelReference, Tensor]:
    """Tensors of the models for one weight, once mergekit has aligned their vocabularies."""
    (tensors,) = (value for _, value in Executor([inputs], math_device=options.device).run(quiet=True))
    return dict(tensors)
