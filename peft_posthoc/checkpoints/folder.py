"""Checkpoints on disk: safetensors or PyTorch files, in a folder or alone, single or sharded, a tensor at a time."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header, once
from peft_posthoc.checkpoints.file_header import TYPES
from peft_posthoc.checkpoints.model_files import (
    config_of,
    file_state,
    is_index,
    no_weights,
    shards_of,
    state_of,
    weight_files,
)
from peft_posthoc.errors import CheckpointError
from peft_posthoc.files import regular

_DTYPES = {code: dtype for dtype, code in TYPES.items()}


class Folder(Checkpoint):
    """A folder as `save_pretrained` writes it. Tensors are mapped from disk, and read when asked for."""

    def __init__(self, folder: Path, *, label: str, revision: str | None = None) -> None:
        self.folder: Path = folder.absolute()
        self.label = label
        self.revision = revision
        self.config = config_of(folder)
        self.headers: dict[str, Header] = {}
        self._files: dict[str, _Safetensors | _Pickle] = {}
        names = {path.name for path in folder.iterdir()}
        chosen = weight_files(names)
        if not chosen:
            inner = sorted(path for path in folder.iterdir() if path.is_dir())
            parts = [path.name for path in inner if weight_files({file.name for file in path.iterdir()})]
            raise CheckpointError(no_weights(f"`{label}`", names, parts=[f"{label.rstrip('/')}/{p}" for p in parts]))
        if is_index(chosen[0]):
            listed = shards_of(folder / chosen[0])
            chosen = sorted(set(listed.values()))
            missing = [file for file in chosen if not (folder / file).is_file()]
            if missing:
                raise CheckpointError(f"The index of `{label}` names shards that are not there: {', '.join(missing)}.")
        else:
            listed = None
        self.files: dict[str, str] = {}
        """By tensor, the name of its file."""
        self.metadata: Mapping[str, str] = {}
        for file in chosen:
            self._add(file, _opened(folder / file))
        # A commit on the hub is its own: wherever, and whenever, its files are.
        own = [_identity(folder / file) for file in chosen]
        self.identity: Any = own if revision is None else [label, revision]
        absent = [tensor for tensor in listed or () if tensor not in self.headers]
        if absent:
            raise CheckpointError(f"The index of `{label}` lists tensors that no shard holds: {', '.join(absent[:5])}.")

    def _add(self, name: str, file: _Safetensors | _Pickle) -> None:
        self.metadata = {**self.metadata, **file.metadata}
        for tensor, header in file.headers.items():
            if tensor in self.headers:
                raise CheckpointError(f"Two files of `{self.label}` hold `{tensor}`; one of them is `{name}`.")
            self.headers[tensor] = header
            self._files[tensor] = file
            self.files[tensor] = name

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file."""
        return self._files[name].read(name)


class File(Checkpoint):
    """A single file of weights, as models are passed around without a folder. It brings no configuration."""

    def __init__(self, path: Path, *, label: str) -> None:
        self.label = label
        self._file = _opened(path)
        self.headers: Mapping[str, Header] = self._file.headers
        self.metadata = self._file.metadata
        self.identity: Any = [_identity(path)]

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from the file."""
        return self._file.read(name)


def dtype_of(code: str, where: str, name: str) -> torch.dtype:
    """The type that safetensors calls so.

    Raises:
        CheckpointError: PyTorch's types that are read here do not include it.
    """
    if code not in _DTYPES:
        raise CheckpointError(f"{where} holds `{name}` as {code}, a type that is not supported.")
    return _DTYPES[code]


def _opened(path: Path) -> _Safetensors | _Pickle:
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickle(path)


def _identity(path: Path) -> list[Any]:
    # Not a hash of the content: that would be one more pass over it.
    stat = path.stat()
    return [str(path.parent.resolve()), path.name, stat.st_size, stat.st_mtime_ns]


class _Safetensors:
    """A file whose header is parsed once; each tensor is mapped by itself, and its pages leave memory with it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = path.absolute()
        with self._readable():
            self._state = state_of(regular(path))
            with safe_open(path, framework="pt") as handle:  # It sees that the header fits the file.
                names = list(handle.keys())
            with self._opened() as file:
                length = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(length))
        self._places = {name: tuple(8 + length + at for at in entries[name]["data_offsets"]) for name in names}
        self.headers = {name: self._header(entries[name], name) for name in names}
        self.metadata: Mapping[str, str] = entries.get("__metadata__") or {}

    def _header(self, entry: Mapping[str, Any], name: str) -> Header:
        return Header(tuple(entry["shape"]), dtype_of(entry["dtype"], f"`{self._path}`", name))

    def read(self, name: str) -> Tensor:
        shape, dtype = self.headers[name]
        start, end = self._places[name]
        before = start % mmap.ALLOCATIONGRANULARITY
        with self._readable(), self._opened() as file:
            if start == end:
                return torch.empty(shape, dtype=dtype)
            # A private mapping: what is written to the tensor would stay in memory, and PyTorch takes no other.
            size = before + end - start
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=start - before)
        return torch.frombuffer(mapped, dtype=torch.uint8, offset=before).view(dtype).view(shape)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        with self._place.open("rb") as file:
            if file_state(os.fstat(file.fileno())) != self._state:
                raise CheckpointError(
                    f"`{self._path}` changed while it was read. Start again when nothing writes to it."
                )
            yield file

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"`{self._path}` is not a readable safetensors file: {error}.") from error


class _Pickle:
    metadata: Mapping[str, str] = MappingProxyType({})

    def __init__(self, path: Path) -> None:
        content = self._load(path)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"`{path}` is refused: it holds a {type(content).__name__}, not tensors by name.")
        strangers = [
            f"`{name}` ({'not dense' if isinstance(value, Tensor) else type(value).__name__})"
            for name, value in content.items()
            if not is_plain(value)
        ]
        if strangers:
            raise CheckpointError(
                f"`{path}` is refused: it holds values that are not plain tensors: {', '.join(strangers[:5])}. Save "
                "the model's state dict alone."
            )
        self._tensors = once({str(name): tensor.detach() for name, tensor in content.items()})
        self.headers = {name: Header(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    @staticmethod
    def _load(path: Path) -> Any:
        try:
            with regular(path).open("rb") as file:
                # Only the zip format, PyTorch's own since 1.6, can be mapped.
                zipped = file.read(4) == b"PK\x03\x04"
            with warnings.catch_warnings():
                # PyTorch remarks on the pickle protocol, and on its own deprecated storages.
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"`{path}` is refused: it is a pickle that holds more than plain tensors, or is no pickle. Nothing of "
                "it was executed. Convert it to safetensors where you trust it."
            ) from error
        except Exception as error:
            # Damaged bytes make the unpickler fail with whatever its next step raises: KeyError, AssertionError, ...
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"`{path}` is not a readable PyTorch file: {first}") from error

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def is_plain(value: Any) -> bool:
    """Tell whether it is a tensor with a value for each of its elements."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_meta or value.is_nested)
    )
