"""Finished layers on disk: what an interrupted run goes on from, and how processes hand their share to one another."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft_posthoc.adapters.card import REPORT
from peft_posthoc.errors import AdapterError, OutputError
from peft_posthoc.extraction.delta import Served
from peft_posthoc.extraction.outcomes import Kept, Layer, Outcome, Skipped
from peft_posthoc.files import write_whole
from peft_posthoc.json_file import read_json
from peft_posthoc.linalg.lowrank import LowRank
from peft_posthoc.linalg.noise import Noise

_FAILED = "failed"


class Spool:
    """A folder beside the adapter to be, bound by its name to all that the layers in it depend on.

    Args:
        out: Where the adapter will be.
        identity: What the layers depend on, as plain JSON values.
    """

    patience = 10.0
    """Seconds of work to hold in memory before the first result is written: what is done again sooner is not worth a
    folder."""

    def __init__(self, out: str | os.PathLike[str], identity: Any) -> None:
        self._pending: list[Outcome] = []
        self._start = time.monotonic()
        key = hashlib.sha256(json.dumps([identity, torch.__version__], sort_keys=True).encode()).hexdigest()
        target = Path(out).absolute()
        self.key = key
        """The same for the same inputs, options and libraries alone."""
        self.folder = target.parent / f"{_prefix(target)}{key[:16]}"
        self._target, self._taken = target, is_taken(target)
        self._above = [path for path in self.folder.parents if not path.exists()]

    def __len__(self) -> int:
        """How many results are kept."""
        return len(list(self.folder.glob("*.safetensors")))

    def put(self, outcome: Outcome) -> None:
        """Keep one result.

        Raises:
            AdapterError: It cannot be written.
        """
        self._pending.append(outcome)
        if time.monotonic() - self._start >= self.patience:
            while self._pending:
                self._write(self._pending.pop())

    def _write(self, outcome: Outcome) -> None:
        if isinstance(outcome, Layer):
            factors = outcome.lowrank
            tensors = {
                "a": factors.a.contiguous(),
                "b": factors.b.contiguous(),
                "s": factors.s,
                "residual": factors.residual,
            }
            numbers = outcome._asdict() | {"factors": [factors.energy, factors.norm, factors.shortfall]}
        elif isinstance(outcome, Kept):
            tensors, numbers = {"value": outcome.value.contiguous()}, outcome._asdict() | {"value": None}
        else:
            tensors, numbers = {}, outcome._asdict()
        path = self._path(outcome.weight)
        # Processes may work on the same weight after a restart: each has a file of its own until it is whole.
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"outcome": json.dumps(numbers)})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            if self.was_overtaken():
                return  # The other run has just removed the folder, or this file.
            raise AdapterError(f"Cannot keep finished layers in `{self.folder}`: {error}.") from error

    def outcomes(self, weights: Iterable[str]) -> list[Outcome]:
        """The kept results of these weights."""
        paths = [self._path(weight) for weight in weights] if self.folder.is_dir() else []
        return [outcome for path in paths if path.is_file() and (outcome := _read(path)) is not None]

    def remove(self) -> None:
        """Remove the folder with all results, and those above it that were made for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self._above:
            with contextlib.suppress(OSError):  # Others use it, or it is not there.
                path.rmdir()

    def fail(self, why: str) -> None:
        """Tell the other processes that there will be no adapter."""
        with contextlib.suppress(OSError, OutputError):  # Then this process' end tells them.
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / _FAILED, why)

    def failed(self, since: float) -> str | None:
        """Why another process made no adapter; None where none has said so since that time."""
        try:
            path = self.folder / _FAILED
            return path.read_text(encoding="utf-8") if path.stat().st_mtime >= since else None
        except OSError:
            return None

    def was_overtaken(self) -> bool:
        """Whether another run has written its adapter to the same place in the meantime."""
        return not self._taken and is_taken(self._target)

    def _path(self, weight: str) -> Path:
        return self.folder / f"{hashlib.sha256(weight.encode()).hexdigest()[:32]}.safetensors"


def _read(path: Path) -> Outcome | None:
    """A result; None if it is damaged, or was removed by another run: it is then worked out again."""
    try:
        return _outcome(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _outcome(path: Path) -> Outcome:
    with safe_open(path, framework="pt") as file:
        numbers = json.loads(file.metadata()["outcome"])
        if "value" in numbers:
            return Kept(**numbers | {"value": file.get_tensor("value")})
        if "factors" not in numbers:
            return Skipped(**numbers)
        energy, norm, shortfall = numbers.pop("factors")
        for name, kind in (("noise", Noise), ("served", Served)):
            numbers[name] = None if numbers[name] is None else kind(*numbers[name])
        numbers["grid"] = None if numbers["grid"] is None else tuple(numbers["grid"])
        a, b, s, residual = (file.get_tensor(name) for name in ("a", "b", "s", "residual"))
    return Layer(factors=LowRank(a, b, s, energy, norm, shortfall, residual), **numbers)


@contextlib.contextmanager
def finished_layers(out: Path, made: Mapping[Path, Mapping[str, Any]]) -> Iterator[None]:
    """Remove what runs, with these or other inputs, have kept beside an adapter, once it is written.

    So it is where another run has written the very same: nothing is left to be done. Any other error that ends the
    writing tells what is kept.

    Args:
        out: What the runs were to write.
        made: By the folder of each adapter that is written, its provenance.
    """
    try:
        yield
    except (AdapterError, KeyboardInterrupt) as error:
        if all(_provenance(folder) == json.loads(json.dumps(own)) for folder, own in made.items()):
            _clear(out)
        elif kept := _kept(out):
            error.add_note(f"Finished layers are kept in `{kept[0]}`. The same command goes on from there.")
        raise
    _clear(out)


def _provenance(folder: Path) -> Any:
    """What an adapter that is there was made of; None if there is none."""
    try:
        return read_json(folder / REPORT)["provenance"]
    except (ValueError, KeyError, TypeError):
        return None


def _clear(out: Path) -> None:
    for folder in _kept(out):
        shutil.rmtree(folder, ignore_errors=True)


def is_taken(out: Path) -> bool:
    """Whether something is where an adapter is to be."""
    return out.is_dir() and any(out.iterdir())


def _kept(out: Path) -> list[Path]:
    if not out.parent.is_dir():
        return []
    return [folder for folder in out.parent.iterdir() if folder.name.startswith(_prefix(out))]


def _prefix(target: Path) -> str:
    return f".{target.name}.spool-"
