"""Models in object stores (`s3://`, `gs://`, ...), through fsspec."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from peft_posthoc.checkpoints.model_files import SUFFIXES, is_index, no_weights, shards_of, weight_files
from peft_posthoc.checkpoints.streamed import Streamed
from peft_posthoc.errors import CheckpointError, FetchError, MissingExtraError

# What says how weights are to be read lies in small files beside them.
_SMALL = (".json", ".model", ".txt", ".jinja")
_LARGEST = 50_000_000


class StoreFiles:
    """Files in a store, each known by what the store says of it when it was opened."""

    def __init__(self, system: Any, place: str, label: str) -> None:
        self._system, self._place, self._label = system, place, label
        self.keys: dict[str, str] = {}
        """By file, what changes when it does."""

    def fetch(self, file: str, start: int, end: int) -> bytes:
        """These bytes of a file.

        Raises:
            CheckpointError: The file is no longer the one that was opened.
            FetchError: They cannot be fetched.
        """
        path = f"{self._place}/{file}"
        try:
            content: bytes = self._system.cat_file(path, start=start, end=end)
            self._system.invalidate_cache(self._place)  # What was listed is not asked for again.
            key = str(self._system.ukey(path))
        except Exception as error:  # Each store raises its own.
            raise FetchError(f"`{file}` of `{self._label}` could not be fetched: {_first(error)}") from error
        if self.keys.setdefault(file, key) != key:
            raise CheckpointError(
                f"`{file}` of `{self._label}` changed while it was read. Start again when nothing writes to it."
            )
        if len(content) != end - start:
            raise CheckpointError(f"`{file}` of `{self._label}` ends before its header says. Store it again.")
        return content


def is_url(source: str) -> bool:
    """Tell whether a source is a place in a store, by its form."""
    protocol, separator, rest = source.partition("://")
    return bool(separator and rest and protocol.isidentifier())


def open_store(url: str, *, role: str) -> Streamed:
    """Open a model's folder, or one safetensors file, in a store.

    Args:
        url: `s3://bucket/folder`, and whatever else fsspec knows.
        role: What messages call it.

    Raises:
        CheckpointError: There is none, or it cannot be read.
        MissingExtraError: The store's own package is not installed.
    """
    import fsspec

    label = url.rstrip("/")
    try:
        system, path = fsspec.url_to_fs(label)
        single = path.endswith(SUFFIXES) and system.isfile(path)
        place = path.rpartition("/")[0] if single else path
        sizes = {entry["name"].rpartition("/")[2]: entry.get("size") or 0 for entry in system.ls(place, detail=True)}
    except ImportError as error:
        raise MissingExtraError(f"The {role} `{label}` needs another package: {_first(error)}") from error
    except Exception as error:  # Each store raises its own.
        raise CheckpointError(f"The {role} `{label}` could not be opened: {_first(error)}") from error
    beside = Path(_kept(tempfile.TemporaryDirectory(prefix="phlora-")))
    try:
        for name, size in sizes.items():
            if not single and name.endswith(_SMALL) and size <= _LARGEST:
                (beside / name).write_bytes(system.cat_file(f"{place}/{name}"))
    except Exception as error:
        raise CheckpointError(f"The {role} `{label}` could not be fetched: {_first(error)}") from error
    chosen = [path.rpartition("/")[2]] if single else weight_files(sizes)
    if chosen and is_index(chosen[0]):
        chosen = sorted(set(shards_of(beside / chosen[0]).values()))
    if not chosen:
        raise CheckpointError(no_weights(f"`{label}`", sizes))
    if other := next((name for name in chosen if not name.endswith(".safetensors") or name not in sizes), None):
        what = "is no safetensors file" if other in sizes else "is not there"
        raise CheckpointError(f"`{other}` of `{label}` {what}: of a store no other is read. Copy it to a local folder.")
    files = StoreFiles(system, place, label)
    found = Streamed(files, chosen, label=label, revision=None, identity=None, beside=None if single else beside)
    found.identity = [label, files.keys]
    return found


_KEPT: list[Any] = []


def _kept(folder: tempfile.TemporaryDirectory[str]) -> str:
    """The path of a folder that is there until this process ends."""
    _KEPT.append(folder)
    return folder.name


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
