"""Extractions in other processes: one at a time, the others in a queue."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from hf_callbacks.task import Task
from peft_posthoc.errors import one_line

# A launcher's own words to its processes: with them, an extraction would take itself for one of several.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")


class Job(NamedTuple):
    """One adapter to be made."""

    name: str
    """Of the adapter's folder: `step-100` or `final`."""
    step: int
    """When its checkpoint was saved."""
    task: Task | None
    """The task that another process is given; None for work that was done here."""
    made: Path
    """The folder that the command writes."""
    pinned: Path | None
    """The folder that it reads, if that goes when the job is done."""
    refines: bool = False
    """Whether the adapter is refined when it is extracted."""


class Done(NamedTuple):
    """A job that came to its end."""

    job: Job
    failure: str | None
    """Why there is no adapter."""
    killed: bool = False
    """True where its process was killed: it can be made again."""
    unrefined: str | None = None
    """Why the adapter is there as it was extracted, where it was to be refined."""


class Jobs:
    """A queue with at most one process.

    Args:
        folder: Where the processes' messages are kept while they run; the system's temporary folder by default,
            which batch systems have been seen to empty.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._waiting: deque[Job] = deque()
        self._running: tuple[Job, subprocess.Popen[bytes], IO[bytes]] | None = None

    def __len__(self) -> int:
        """How many have not come to their end."""
        return len(self._waiting) + (self._running is not None)

    def __contains__(self, name: object) -> bool:
        jobs = [*self._waiting, *([self._running[0]] if self._running else [])]
        return any(job.name == name for job in jobs)

    def add(self, job: Job) -> None:
        """Put a job at the end of the queue."""
        self._waiting.append(job)

    def poll(self) -> list[Done]:
        """Jobs that came to their end since it was last asked; the next one is started."""
        ended = []
        if self._running is not None:
            job, process, errors = self._running
            if process.poll() is None:
                return []
            errors.seek(0)
            text = errors.read().decode(errors="replace").strip()
            self._let_go()
            ended.append(Done(job, _failure(process.returncode, text), killed=process.returncode < 0))
        while self._waiting and self._running is None:
            job = self._waiting.popleft()
            try:
                self._running = (job, *_start(job, self._folder))
            except (OSError, ValueError) as error:  # ValueError: a NUL in an argument
                ended.append(Done(job, f"its process could not be started: {one_line(error)}"))
        return ended

    def wait(self) -> Iterator[Done]:
        """Every job that is left, as it comes to its end."""
        while len(self):
            yield from self.poll()
            time.sleep(0.02)

    def stop(self) -> None:
        """End what runs, and forget the rest."""
        self._waiting.clear()
        if self._running is not None:
            _, process, _ = self._running
            self._let_go()  # which tells it to clean up and end
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _let_go(self) -> None:
        if self._running is not None:
            _, process, errors = self._running
            if process.stdin is not None:
                process.stdin.close()
            errors.close()
            self._running = None


def _start(job: Job, folder: Path | None) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in _LAUNCHER and not key.startswith(_LAUNCHER_PREFIXES)
    }
    task = job.made.with_name(f"{job.made.name}.json")
    if job.task is not None:
        job.task.write(task)
    errors = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (it is read, and closed, when the process has ended)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_callbacks.child", str(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            # Out of reach of a Ctrl-C in the terminal, which is the trainer's; not in a session of its own, because
            # Linux shares the processor out among sessions first, and by priority only within one.
            process_group=0,
        )
    except BaseException:
        errors.close()
        raise
    return process, errors


def _failure(status: int, text: str) -> str | None:
    if status == 0:
        return None
    if status < 0:
        return f"its process was killed by signal {-status}"
    last = text.splitlines()[-1] if text else f"its process ended with status {status}"
    return last.removesuffix(".")
