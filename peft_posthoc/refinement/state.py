"""What an interrupted fit goes on from: its text, and where it had come to, beside the place of the adapter."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_posthoc.errors import OutputError, PosthocError
from peft_posthoc.texts.sequences import Tokens

_TEXTS, _FIT = "texts.safetensors", "fit.safetensors"
_FORM = 4
"""Of what is kept, and of what its numbers mean: those of another form are not gone on from."""


class State:
    """A folder beside the adapter to be, bound by its name to all that the fit depends on.

    Args:
        out: Where the adapter will be.
        identity: What the fit depends on, as plain JSON values.
    """

    patience = 10.0
    """Seconds of work between two times that it is written: what is done again sooner is not worth it."""

    def __init__(self, out: str | os.PathLike[str], identity: Any) -> None:
        self._out = Path(out).absolute()
        key = hashlib.sha256(json.dumps([identity, torch.__version__, _FORM], sort_keys=True).encode()).hexdigest()
        self.folder = self._out.parent / f"{_prefix(self._out)}{key[:16]}"
        self._written = time.monotonic()

    @property
    def others(self) -> list[Path]:
        """Of fits to the same place with other models, options or adapters."""
        return [folder for folder in _beside(self._out) if folder != self.folder]

    def begin(self) -> None:
        """Make its folder: that there is no place for it is told before the work.

        Raises:
            OutputError: It cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_kept(error) from error

    def texts(self) -> list[Tokens] | None:
        """The text that was written; None if it was not, or is damaged."""
        if (found := self._read(_TEXTS)) is None:
            return None
        tensors, rest = found
        return [
            Tokens(tuple(ids.tolist()), kind, tuple(fixed), prompt)
            for ids, (kind, fixed, prompt) in zip(tensors["ids"].split(tensors["lengths"].tolist()), rest, strict=True)
        ]

    def keep_texts(self, texts: Sequence[Tokens]) -> None:
        """Keep what was written.

        Raises:
            OutputError: It cannot be.
        """
        lengths = torch.tensor([len(text.ids) for text in texts])
        ids = torch.tensor([token for text in texts for token in text.ids])
        self._write(_TEXTS, {"ids": ids, "lengths": lengths}, [text[1:] for text in texts])

    def fit(self) -> tuple[dict[str, Tensor], Any] | None:
        """The tensors and the numbers that were kept last; None if none were, or they are damaged."""
        return self._read(_FIT)

    @property
    def is_due(self) -> bool:
        """Whether there is enough to lose."""
        return time.monotonic() - self._written >= self.patience

    def keep(self, tensors: Mapping[str, Tensor], numbers: Any) -> None:
        """Keep where the fit has come to, in place of what was kept before.

        Raises:
            OutputError: It cannot be.
        """
        start = time.monotonic()
        self._write(_FIT, tensors, numbers)
        self._written = time.monotonic()
        self.patience = max(self.patience, 50 * (self._written - start))  # A large one on a slow disk.

    @property
    def has_fit(self) -> bool:
        """Whether a fit has come far enough to be kept."""
        return self._has(_FIT)

    @property
    def told(self) -> str | None:
        """What is kept, and that it is of use; None if nothing is."""
        if self.has_fit:
            what = "Text and fit are"
        elif self._has(_TEXTS):
            what = "The text is"
        else:
            return None
        return f"{what} kept in `{self.folder}`. The same command goes on from there."

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _has(self, name: str) -> bool:
        try:
            return (self.folder / name).is_file()
        except OSError:  # No folder can have that name.
            return False

    def _read(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                names = file.keys()
                return {key: file.get_tensor(key) for key in names}, json.loads(file.metadata()["numbers"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def _write(self, name: str, tensors: Mapping[str, Tensor], numbers: Any) -> None:
        self.begin()
        try:
            partial = self.folder / f"{name}.partial"
            save_file({key: x.contiguous() for key, x in tensors.items()}, partial, {"numbers": json.dumps(numbers)})
            partial.replace(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise self._not_kept(error) from error

    def _not_kept(self, error: Exception) -> OutputError:
        return OutputError(f"What an interrupted run goes on from cannot be kept in `{self.folder}`: {error}.")


def state_of(out: str | os.PathLike[str], parts: Sequence[Any]) -> State | None:
    """The state of a fit by all that it depends on; None if there is something to know it by that could change unseen.

    Args:
        out: Where the adapter will be.
        parts: Dataclasses, tensors by name, plain values; None where there is nothing to know a part by.
    """
    try:
        known = [_known(part) for part in parts]
        json.dumps(known)
    except TypeError:
        return None
    return State(out, known)


def _known(part: Any) -> Any:
    if part is None:
        raise TypeError("there is nothing to know it by")
    if isinstance(part, Mapping) and all(isinstance(x, Tensor) for x in part.values()):
        digest = hashlib.sha256()
        for name, x in sorted(part.items()):
            digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
            digest.update(x.contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
    if isinstance(part, Mapping | list | str):
        return part
    return [type(part).__name__, {field.name: getattr(part, field.name) for field in fields(part)}]


@contextmanager
def going_on(state: State | None) -> Iterator[None]:
    """Tell of what is kept, where the `with` block is interrupted, or has no room; remove it, where it fails for good.

    What fails after a fit was kept may have failed by accident.
    """
    try:
        if state is not None:
            state.begin()
        yield
    except (KeyboardInterrupt, PosthocError, ValueError) as error:
        if state is not None and not state.has_fit and not isinstance(error, KeyboardInterrupt | OutputError):
            state.remove()
        if state is not None and (told := state.told) is not None:
            error.add_note(told)
        raise
    finally:
        if state is not None:
            with suppress(OSError):  # Not empty, or gone.
                state.folder.rmdir()


def is_same(adapter: str, out: str | os.PathLike[str]) -> bool:
    """Whether what is written takes the place of the adapter that the fit began with, by what that is called."""
    return Path(adapter).resolve() == Path(out).resolve()


def clear(out: str | os.PathLike[str]) -> None:
    """Remove what fits, with these or other inputs, have kept beside an adapter, once it is written."""
    for folder in _beside(Path(out).absolute()):
        shutil.rmtree(folder, ignore_errors=True)


def _beside(out: Path) -> list[Path]:
    if not out.parent.is_dir():
        return []
    return [folder for folder in out.parent.iterdir() if folder.name.startswith(_prefix(out)) and folder.is_dir()]


def _prefix(out: Path) -> str:
    return f".{out.name}.refine-"
