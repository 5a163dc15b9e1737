"""Finished layers on disk: what an interrupted run goes on from, and how processes hand their share to one another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft_posthoc.errors import AdapterError
from peft_posthoc.factor import Kept, Layer, Outcome, Skipped
from peft_posthoc.noise import Noise
from peft_posthoc.svd import LowRank


class Spool:
    """A folder beside the adapter to be, bound by its name to all that the layers in it depend on.

    Args:
        out: Where the adapter will be.
        identity: What the layers depend on, as plain JSON values.
        patience: Seconds of work to hold in memory before the first result is written. What is done again sooner than
            that is not worth a folder.
    """

    def __init__(self, out: str | os.PathLike[str], identity: Any, *, patience: float = 10.0) -> None:
        self._pending: list[Outcome] = []
        self._start, self._patience = time.monotonic(), patience
        key = hashlib.sha256(json.dumps([identity, torch.__version__], sort_keys=True).encode()).hexdigest()
        target = Path(out).absolute()
        self.folder = target.parent / f"{_prefix(target)}{key[:16]}"

    def __len__(self) -> int:
        """How many results are kept."""
        return len(list(self.folder.glob("*.safetensors")))

    def put(self, outcome: Outcome) -> None:
        """Keep one result.

        Raises:
            AdapterError: It cannot be written.
        """
        self._pending.append(outcome)
        if time.monotonic() - self._start >= self._patience:
            while self._pending:
                self._write(self._pending.pop())

    def _write(self, outcome: Outcome) -> None:
        if isinstance(outcome, Layer):
            factors = outcome.factors
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
            raise AdapterError(f"Cannot keep finished layers in `{self.folder}`: {error}.") from error

    def outcomes(self, weights: Iterable[str]) -> list[Outcome]:
        """The kept results of these weights."""
        paths = {weight: self._path(weight) for weight in weights} if self.folder.is_dir() else {}
        return [_read(path) for path in paths.values() if path.is_file()]

    def remove(self) -> None:
        """Remove the folder with all results."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, weight: str) -> Path:
        return self.folder / f"{hashlib.sha256(weight.encode()).hexdigest()[:32]}.safetensors"


def _read(path: Path) -> Outcome:
    with safe_open(path, framework="pt") as file:
        numbers = json.loads(file.metadata()["outcome"])
        if "value" in numbers:
            return Kept(**numbers | {"value": file.get_tensor("value")})
        if "factors" not in numbers:
            return Skipped(**numbers)
        energy, norm, shortfall = numbers.pop("factors")
        noise = numbers.pop("noise")
        numbers["noise"] = None if noise is None else Noise(*noise)
        a, b, s, residual = (file.get_tensor(name) for name in ("a", "b", "s", "residual"))
    return Layer(factors=LowRank(a, b, s, energy, norm, shortfall, residual), **numbers)


def clear(out: str | os.PathLike[str]) -> None:
    """Remove whatever runs, with these or other inputs, have kept beside an adapter that is now there."""
    target = Path(out).absolute()
    for folder in target.parent.iterdir():
        if folder.name.startswith(_prefix(target)):
            shutil.rmtree(folder, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.spool-"
