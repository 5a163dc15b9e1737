"""Both models without their weights, each of which is loaded when it writes: the other one is gone then."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import torch

from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.running.empty import Weights, empty_model, empty_with_adapter
from peft_posthoc.running.live import Live, check_classes, check_finite, load_side, rows_brought, tokenizer_beside
from peft_posthoc.running.load import load_model


@dataclass(frozen=True, kw_only=True)
class InTurns(Live):
    """A tuned model, and its base with an adapter on it, that do not write themselves."""

    loads: tuple[Callable[[], Any], ...]
    """Load the base alone, and the tuned model."""

    @contextmanager
    def writers(self) -> Iterator[tuple[Any, Any]]:
        """The base alone and the tuned model, in turns: each is loaded when it writes, and the other goes."""
        turns = _Turns(self.loads, self.vocabulary)
        try:
            yield _Writer(0, self.model, turns), _Writer(1, self.tuned, turns)
        finally:
            turns.end()


class _Turns:
    """The one model that is in memory."""

    def __init__(self, loads: Sequence[Callable[[], Any]], vocabulary: int) -> None:
        self._loads, self._vocabulary, self._model = loads, vocabulary, None
        self._side: int | None = None

    def of(self, side: int) -> Any:
        if side != self._side:
            self.end()
            self._model, self._side = self._loads[side](), side
            check_finite(("base", "tuned model")[side], self._model, self._vocabulary)
        return self._model

    def end(self) -> None:
        if self._model is not None:
            self._model = self._side = None
            gc.collect()  # transformers' models have circles in them.


@dataclass(frozen=True)
class _Writer:
    """Stands for a model where text is written, as one that PEFT has put something around."""

    side: int
    empty: Any
    turns: _Turns

    @property
    def config(self) -> Any:
        return self.empty.config

    @property
    def generation_config(self) -> Any:
        return self.empty.generation_config

    def get_base_model(self) -> Any:
        return self.turns.of(self.side)


def load_empty(
    base: Checkpoint,
    tuned: Checkpoint,
    adapter: str | PathLike[str],
    file: AdapterFile,
    *,
    device: torch.device,
    tokenizer: Any = None,
) -> InTurns:
    """Build both models without weights, but for the adapter's, which is put on the base (see `load_live`).

    Raises:
        AdapterError: PEFT cannot load the adapter.
        CheckpointError: A model cannot be built, or is none that says next tokens.
        MismatchError: They are of two classes, or know other tokens.
    """
    check_classes(base, tuned)

    def empty(checkpoint: Checkpoint, cls: Any, where: torch.device) -> Any:
        return empty_model(checkpoint, cls)

    with torch.random.fork_rng():  # Classes and PEFT draw what is then replaced.
        before, after = (load_side(side, device, empty) for side in (base, tuned))
        rows_brought(file, (base.label, before), (tuned.label, after), whole=False)
        adapted = empty_with_adapter(before, adapter, file)
    weights = Weights(adapted, base, device), Weights(after, tuned, device)
    # In the type of the file: it only writes, and in half the memory.
    auto = partial(load_model, dtype="auto")
    loads = tuple(partial(load_side, side, device, auto) for side in (base, tuned))
    return InTurns(adapted, after, tokenizer_beside(tokenizer, tuned, base), weights=weights, loads=loads)
