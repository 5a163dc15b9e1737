"""Words of the callback: numbers to trackers and to the trainer's history, warnings to the logger.

Nothing of it is seen by the training. `Trainer.log` would be: it clears `control.should_log`, so that a process that
logs alone skips a collective in which the others wait, and that step's loss is in no log.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState

from hf_callbacks.turns import are_several
from peft_posthoc.errors import PosthocError, one_line

logger = logging.getLogger(__name__)

_SUMMARY = "train_runtime"


def is_summary(row: dict[str, Any]) -> bool:
    """Tell whether a row of the log is the one that the Trainer ends a training with."""
    return _SUMMARY in row


def calling_trainer() -> Trainer | None:
    """The trainer whose event this is: it hands over its model and its state, but not itself."""
    frame = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer):
            return candidate
        frame = frame.f_back  # type: ignore[assignment]
    return None


class Log:
    """The log of one trainer's runs.

    Args:
        strict: Raise what is otherwise a warning.
    """

    def __init__(self, *, strict: bool) -> None:
        self.trainer: Trainer | None = None
        self.state: TrainerState | None = None
        self.trackers_are_open = True
        self._strict = strict

    def numbers(self, values: dict[str, float], *, by: TrainerCallback) -> None:
        """Add a row to the trainer's history, and show it to its trackers.

        The row of the training's summary stays the last one.

        Args:
            values: The row; epoch and step are added.
            by: The callback that says it, which is not told.
        """
        row, state = dict(values), self.state
        if state is None:
            return
        if state.epoch is not None:
            row["epoch"] = state.epoch
        history = state.log_history
        place = len(history) - 1 if history and is_summary(history[-1]) else len(history)
        history.insert(place, {**row, "step": state.global_step})
        if self.trainer is None or not self.trackers_are_open:
            return
        handler = self.trainer.callback_handler
        for callback in handler.callbacks:
            # With several processes this one logs alone, and what other people's code does then is not known: it may
            # wait for the other processes.
            if callback is by or (are_several() and not _is_transformers_own(callback)):
                continue
            try:
                callback.on_log(
                    self.trainer.args,
                    copy.copy(state),
                    copy.copy(self.trainer.control),
                    logs=dict(row),
                    model=handler.model,
                    processing_class=handler.processing_class,
                    optimizer=handler.optimizer,
                    lr_scheduler=handler.lr_scheduler,
                    train_dataloader=handler.train_dataloader,
                    eval_dataloader=handler.eval_dataloader,
                )
            except Exception as error:  # a tracker's trouble is not worth the training
                self.warn(f"`{type(callback).__name__}` did not take the numbers of an adapter: {one_line(error)}")

    def guarded(self, what: str, work: Callable[[], object]) -> None:
        """Do something that must not end the training.

        Args:
            what: What is told if it fails, before the reason.
            work: What is done.

        Raises:
            PosthocError: It fails, and the log is strict.
        """
        try:
            work()
        except Exception as error:  # whatever it is, it is not worth the training; it is told, or raised by `strict`
            if self._strict and isinstance(error, PosthocError):
                raise
            self.warn(f"{what}: {one_line(error)}", error)

    def warn(self, message: str, cause: Exception | None = None) -> None:
        """Say what did not work.

        Raises:
            PosthocError: The log is strict.
        """
        message = message.removesuffix(".")
        if self._strict:
            raise PosthocError(f"{message[0].upper()}{message[1:]}.") from cause
        logger.warning("phlora: %s. Training goes on.", message)


def _is_transformers_own(callback: TrainerCallback) -> bool:
    module: str = type(callback).on_log.__module__
    return module.partition(".")[0] == "transformers"
