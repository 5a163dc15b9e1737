"""Safetensors files elsewhere, of which each tensor is fetched by itself when it is read: nothing is kept on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.folder import dtype_of
from peft_posthoc.checkpoints.model_files import config_of
from peft_posthoc.compute.workers import Workers
from peft_posthoc.errors import CheckpointError

# Fetched at a time: what is done again when a connection ends, and few enough requests for a large tensor.
PIECE = 32 * 2**20
_CONNECTIONS = 4
_LONGEST_HEADER = 100_000_000  # safetensors' own bound


class Files(Protocol):
    """Files elsewhere, as far as they are needed."""

    def fetch(self, file: str, start: int, end: int) -> bytes:
        """These bytes of a file.

        Raises:
            CheckpointError: The file is no longer the one that was opened.
            FetchError: They cannot be fetched.
        """


class Streamed(Checkpoint):
    """The tensors of several safetensors files, each fetched when it is read."""

    def __init__(
        self,
        files: Files,
        names: Sequence[str],
        *,
        label: str,
        revision: str | None,
        identity: Any,
        beside: Path | None,
    ) -> None:
        """Read the headers.

        Args:
            files: Where the files are.
            names: Of those with the weights.
            label: The user's name for the model.
            revision: Its commit, if it has one.
            identity: Plain JSON values that change when the files do.
            beside: A folder with the small files, such as the configuration.

        Raises:
            CheckpointError: A file is no safetensors, or two hold the same tensor.
        """
        self.label, self.revision, self.identity, self.beside = label, revision, identity, beside
        self.config = None if beside is None else config_of(beside)
        self.headers: dict[str, Header] = {}
        self.metadata: Mapping[str, str] = {}
        self._files = files
        self._places: dict[str, tuple[str, int, int]] = {}
        for name in names:
            self._add(name)
        self.to_stream = sum(end - start for _, start, end in self._places.values())
        """Bytes that are fetched when every tensor is read."""

    def _add(self, file: str) -> None:
        where = f"`{file}` of `{self.label}`"
        length = int.from_bytes(self._files.fetch(file, 0, 8), "little")
        if not 2 <= length <= _LONGEST_HEADER:
            raise CheckpointError(f"{where} is not a readable safetensors file: its header cannot be that long.")
        try:
            entries = json.loads(self._files.fetch(file, 8, 8 + length))
            metadata = entries.pop("__metadata__", None) or {}
            found = {
                name: (Header(tuple(entry["shape"]), dtype_of(entry["dtype"], where, name)), *entry["data_offsets"])
                for name, entry in entries.items()
            }
            sound = all(0 <= start <= end and end - start == header.bytes for header, start, end in found.values())
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
            raise CheckpointError(f"{where} is not a readable safetensors file: {error!r}.") from error
        if not sound:
            raise CheckpointError(f"{where} is not a readable safetensors file: its header fits no tensors.")
        for name, (header, start, end) in found.items():
            if name in self.headers:
                raise CheckpointError(f"Two files of `{self.label}` hold `{name}`; one of them is `{file}`.")
            self.headers[name] = header
            self._places[name] = file, 8 + length + start, 8 + length + end
        self.metadata = {**self.metadata, **metadata}

    def read(self, name: str) -> Tensor:
        """The tensor of that name, fetched a piece at a time.

        Raises:
            CheckpointError: It cannot be fetched, or its file has changed.
        """
        return self.rows(name, None)

    def rows(self, name: str, count: int | None) -> Tensor:
        """The first rows of a tensor; all of them if None.

        Raises:
            CheckpointError: They cannot be fetched, or their file has changed.
        """
        (file, start, end), (shape, dtype) = self._places[name], self.headers[name]
        if count is not None:
            shape = (min(count, shape[0]), *shape[1:])
            end = start + Header(shape, dtype).bytes
        if start == end:
            return torch.empty(shape, dtype=dtype)
        content = bytearray(end - start)

        def fetch(at: int) -> None:
            piece = self._files.fetch(file, at, min(at + PIECE, end))
            content[at - start : at - start + len(piece)] = piece

        with Workers(_CONNECTIONS) as workers:
            for _ in workers.map(fetch, range(start, end, PIECE)):
                pass
        return torch.frombuffer(content, dtype=torch.uint8).view(dtype).view(shape)
