"""How the processes of a fleet tell the first one that their share is done, whatever came of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

from peft_posthoc.extraction.processes import Processes


def start() -> float:
    """When this process' launcher started: what is older was left by another run.

    Launchers start processes when all of them are there, so that nothing of this run is older than any of them.
    """
    return float(psutil.Process(os.getppid()).create_time())


def leave(out: Path, processes: Processes) -> None:
    """Say that this process will write no more."""
    out.mkdir(parents=True, exist_ok=True)
    _mark(out, processes.rank).touch()


def wait(out: Path, processes: Processes) -> None:
    """Wait until all others have said so. Should one die, the launcher ends this process too."""
    for rank in range(1, processes.size):
        mark = _mark(out, rank)
        while not (mark.exists() and mark.stat().st_mtime >= start()):
            time.sleep(0.05)
        mark.unlink()


def _mark(out: Path, rank: int) -> Path:
    return out / f".phlora_share-{rank}"
