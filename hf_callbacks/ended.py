"""Adapters and uploads that have come to their end: told, logged, and sent on."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable

from transformers import TrainerCallback

from hf_callbacks.jobs import Done, Job
from hf_callbacks.log import Log
from hf_callbacks.metrics import eval_losses, metrics, read_report, refined_metrics
from hf_callbacks.push import Push, Sent
from hf_callbacks.run import FINAL, Run

logger = logging.getLogger(__name__)


class Ended:
    """Tells of adapters and uploads.

    Args:
        log: Where it does.
        by: The callback in whose name it does.
    """

    def __init__(self, log: Log, *, by: TrainerCallback) -> None:
        self.is_first = True
        """True as long as no adapter of this run has been told of."""
        self._log, self._by = log, by

    def adapters(self, run: Run, push: Push | None, ended: Iterable[Done]) -> None:
        """Log the numbers of adapters, and why others are not there; upload them where that is wanted."""
        for job, failure, _, unrefined in ended:
            name = job.name
            if failure is not None:
                self._log.warn(f"there is no adapter `{name}`: {failure}")
                continue
            if unrefined is not None:
                self._log.warn(f"`{name}` is as it was extracted, not refined: {unrefined}")
            self._log.guarded(f"the numbers of `{name}` were not logged", functools.partial(self._adapter, run, job))
            if push is not None:
                add = functools.partial(push.add, run.out / name, step=job.step)
                self._log.guarded(f"`{name}` was not uploaded to `{push.repo_id}`", add)

    def uploads(self, push: Push, ended: Iterable[Sent]) -> None:
        """Log which uploads failed."""
        for name, failure in ended:
            if failure is not None:
                self._log.warn(f"`{name}` was not uploaded to `{push.repo_id}`: {failure}")

    def _adapter(self, run: Run, job: Job) -> None:
        report = read_report(run.out / job.name)
        if self.is_first or job.name == FINAL:  # they hardly change from one checkpoint to the next
            for warning in report["warnings"]:
                logger.warning("phlora: %s: %s", job.name, warning)
        self.is_first = False
        if job.name != FINAL:
            self._log.numbers(metrics(report, step=job.step), by=self._by)
        elif "refined" in report:
            self._log.numbers(refined_metrics(report, step=job.step), by=self._by)
        if self._log.state is not None:
            run.losses = eval_losses(self._log.state.log_history)
        self._log.guarded("the page of the adapters was not written", run.write_page)
