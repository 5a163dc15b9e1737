"""What the drivers share. A driver runs in its engine's own environment: the standard library and NumPy alone here.

`python drive_X.py JOB OUT`. JOB is JSON: `base`, a model's folder; `adapters`, folders by name; `prompts`, lists of
token ids; `rank`, the largest; `mixed`, pairs of an adapter's name (or null) and a prompt's number. OUT gets
`NAME.npy`, the log-probabilities of the next token after each prompt (prompts x vocabulary), or `NAME.txt`, the
engine's own refusal; `base.npy` without an adapter; `NAME.beside.npy`, the base's right after, with the adapter loaded,
and `mixed.npy`, one batch of all the pairs, where the engine does that; and `versions.json`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """An engine with a base in it."""

    versions: dict[str, str]

    def next_token(self, adapter: str | None, prompts: list[list[int]]) -> Any:
        """The log-probabilities of the next token after each prompt, with the adapter in this folder."""


def drive(load: Callable[[dict[str, Any]], Engine]) -> None:
    """Do what the command line says; what is done already is left alone, so that a driver that died can go on."""
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    engine = load(job)
    (out / "versions.json").write_text(json.dumps(engine.versions))
    for name, folder in {"base": None, **job["adapters"]}.items():
        if not _done(out, name):
            ran = _keep(out / name, lambda folder=folder: engine.next_token(folder, job["prompts"]))
            if ran and folder and hasattr(engine, "beside"):
                _keep(out / f"{name}.beside", lambda folder=folder: engine.beside(folder, job["prompts"]))
    if job["mixed"] and hasattr(engine, "mixed") and not _done(out, "mixed"):
        rows = [(job["adapters"].get(name), job["prompts"][number]) for name, number in job["mixed"]]
        _keep(out / "mixed", lambda: engine.mixed(rows))


def log_softmax(logits: Any) -> np.ndarray:
    """The logarithm of the softmax over the last axis, in float64."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _done(out: Path, name: str) -> bool:
    return any((out / f"{name}{ending}").exists() for ending in (".npy", ".txt"))


def _keep(stem: Path, run: Callable[[], Any]) -> bool:
    # Who starts us reads this name, if this is what the process dies of.
    now = stem.parent / "now"
    now.write_text(stem.name)
    try:
        rows = np.asarray(run(), dtype=np.float64)
    except (Exception, SystemExit) as error:
        stem.with_name(f"{stem.name}.txt").write_text(f"{type(error).__name__}: {error}")
        return False
    else:
        np.save(stem.with_name(f"{stem.name}.npy"), rows)
        return True
    finally:
        now.unlink()
