"""A sharded training checkpoint as torch.distributed.checkpoint writes it, read one tensor at a time in one process.

`.metadata` says which region of which tensor lies where in the `*.distcp` files. It is a pickle, which torch would run.
Here it is read as plain values, of which nothing can run; and the regions by `torch.load`, as weights only.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.folder import is_plain
from peft_posthoc.checkpoints.model_files import config_of, home_of, state_of, weight_files
from peft_posthoc.errors import CheckpointError
from peft_posthoc.files import regular

METADATA = ".metadata"

# All that torch 2.13 names in the file besides `torch.Size` and dtypes. None of it is imported or called: a `_Record`
# stands for each.
_RECORDS: Mapping[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.serialization": frozenset({"_get_layout"}),
    # Where it was saved, under Python up to 3.12 and since 3.13.
    "pathlib": frozenset({"PosixPath", "WindowsPath"}),
    "pathlib._local": frozenset({"PosixPath", "WindowsPath"}),
}


class _Record:
    """An object in the metadata: its fields, and nothing that it could do."""

    state: Any = None

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __getitem__(self, field: Any) -> Any:
        return self.state[field]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return _Record
        if module == "torch":
            # Not `getattr`: of torch, that imports what is not there yet.
            found = vars(torch).get(name)
            if isinstance(found, torch.dtype):
                return found
            if found is torch.Size:
                return tuple
        raise pickle.UnpicklingError(f"{module}.{name}")


class _Piece(NamedTuple):
    """A region of a tensor, and where it lies."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


def find_shards(folder: Path) -> Path | None:
    """The folder of shards that a model has to be read from: `folder` itself, or the one within it.

    None where the folder holds weights of another kind: they are easier to read, and the same. Optimizer states lie in
    folders of the same kind and are passed over.

    Raises:
        CheckpointError: The folder holds several sharded models.
    """
    if weight_files({path.name for path in folder.iterdir()}):
        return None
    if _holds_shards(folder):
        return folder
    inner = sorted(path for path in folder.iterdir() if not path.name.startswith("optimizer") and _holds_shards(path))
    if len(inner) > 1:
        names = ", ".join(path.name for path in inner)
        raise CheckpointError(f"`{folder}` holds several sharded models ({names}). Give one of these folders.")
    return inner[0] if inner else None


def _holds_shards(folder: Path) -> bool:
    return folder.is_dir() and any(True for pattern in (METADATA, "*.distcp") for _ in folder.glob(pattern))


class Distcp(Checkpoint):
    """A folder of shards. Each tensor is put together from its pieces when it is asked for."""

    def __init__(self, folder: Path, shards: Path, *, label: str) -> None:
        """Open the shards of a model.

        Args:
            folder: What the user gave; `config.json` lies there, or beside the shards' folder.
            shards: The folder of shards in it, as `find_shards` gives it.
            label: What messages call it.
        """
        self.label = label
        self.beside = home_of(folder, shards)
        self.config = config_of(self.beside)
        self._shards, self._place = shards, shards.absolute()
        content = _read_metadata(shards / METADATA)
        try:
            stored = _stored(content)
        except CheckpointError as error:
            raise CheckpointError(f"`{shards / METADATA}` is refused: {error}") from error
        except Exception as error:
            # What a file that is made up lacks, or holds in place of a number, fails in the most different ways.
            raise CheckpointError(
                f"`{shards / METADATA}` is no metadata of a checkpoint: {repr(error)[:200]}."
            ) from error
        self.headers = {name: header for name, (header, _) in stored.items()}
        self._pieces = {name: pieces for name, (_, pieces) in stored.items()}
        self._states = self._check_files()
        files = {METADATA: state_of(shards / METADATA), **self._states}
        self.identity: Any = [
            [str(shards.resolve()), file, size, modified] for file, (_, size, modified) in files.items()
        ]

    def _check_files(self) -> dict[str, tuple[int, int, int]]:
        ends: dict[str, int] = {}
        for piece in (piece for pieces in self._pieces.values() for piece in pieces):
            ends[piece.file] = max(piece.start + piece.length, ends.get(piece.file, 0))
        missing = sorted(file for file in ends if not (self._shards / file).is_file())
        if missing:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise CheckpointError(
                f"`{self._shards}` lacks shards that its metadata names: {', '.join(missing[:8])}{more}. If each node "
                "wrote to a disk of its own, bring them together in one folder."
            )
        states = {file: state_of(self._shards / file) for file in sorted(ends)}
        for file, (_, size, _) in states.items():
            if size < ends[file]:
                raise CheckpointError(
                    f"`{self._shards / file}` is cut off: it has {size} bytes, and tensors up to byte {ends[file]}."
                )
        return states

    def read(self, name: str) -> Tensor:
        """One tensor, put together from its pieces."""
        header, pieces = self.headers[name], self._pieces[name]
        if len(pieces) == 1:
            return self._load(pieces[0], header.dtype)
        # Zeros, not `empty`: metadata that lies about regions must not show what was in memory before.
        whole = torch.zeros(header.shape, dtype=header.dtype)
        for piece in pieces:
            region = tuple(slice(at, at + size) for at, size in zip(piece.offsets, piece.shape, strict=True))
            whole[region] = self._load(piece, header.dtype)
        return whole

    def _load(self, piece: _Piece, dtype: torch.dtype) -> Tensor:
        path = self._shards / piece.file
        try:
            with (self._place / piece.file).open("rb") as file:
                if state_of(self._place / piece.file) != self._states[piece.file]:
                    raise CheckpointError(f"`{path}` changed while it was read. Start again when nothing writes to it.")
                file.seek(piece.start)
                content = io.BytesIO(file.read(piece.length))
            tensor: Tensor = torch.load(content, map_location="cpu", weights_only=True)
        except CheckpointError:
            raise
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"`{path}` is refused: it holds more than plain tensors, or is damaged. Nothing of it was executed."
            ) from error
        except Exception as error:
            # Damaged bytes make it fail with whatever its next step raises.
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"`{path}` is not a readable shard: {first}") from error
        if not is_plain(tensor) or tensor.shape != piece.shape or tensor.dtype is not dtype:
            raise CheckpointError(f"`{path}` is refused: it does not hold the tensor that its metadata describes.")
        return tensor.detach()


def _read_metadata(path: Path) -> Any:
    try:
        content = regular(path).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"`{path}` is missing, and the shards beside it mean nothing without it: saving did not end, or another "
            "node wrote it."
        ) from error
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read: {error}.") from error
    try:
        return _Unpickler(io.BytesIO(content)).load()
    except Exception as error:
        # Garbage makes an unpickler fail with almost anything: IndexError, MemoryError, UnicodeDecodeError, ...
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"`{path}` is refused: it is a pickle that holds more than the metadata of tensors, or is no pickle "
            f"({first[:100]}). Nothing of it was executed."
        ) from error


def _stored(metadata: Any) -> dict[str, tuple[Header, list[_Piece]]]:
    """Every tensor's header and pieces, as the metadata has them, checked: they come from a file that anyone can write.

    Raises:
        CheckpointError: A tensor cannot be put together, or would be read from elsewhere.
        Exception: It has another form.
    """
    places = {(index["fqn"], index.state.get("offset")): info for index, info in metadata["storage_data"].items()}
    found: dict[str, tuple[Header, list[_Piece]]] = {}
    # Entries without fields are no tensors.
    entries = {key: entry for key, entry in metadata["state_dict_metadata"].items() if entry.state}
    for key, name in _names(list(entries), metadata["planner_data"] or {}).items():
        entry = entries[key]
        header = Header(_counts(entry["size"]), entry["properties"][0])
        if not isinstance(header.dtype, torch.dtype):
            raise TypeError(f"`{key}` has no dtype")
        # Of a small tensor, all processes that have nothing of it write the same empty piece.
        chunks = {_counts(chunk["offsets"]): _counts(chunk["sizes"]) for chunk in entry["chunks"]}
        pieces = [_piece(key, header, at, shape, places[key, at]) for at, shape in chunks.items()]
        if sum(math.prod(piece.shape) for piece in pieces) != math.prod(header.shape):
            raise CheckpointError(f"its pieces of `{key}` do not make up a tensor of shape {list(header.shape)}.")
        if name in found:
            raise CheckpointError(f"it holds `{name}` twice.")
        found[name] = header, pieces
    return found


def _names(keys: list[str], paths: Mapping[str, tuple[str | int, ...]]) -> dict[str, str]:
    """Each stored key's name in the model.

    What is saved as `{"model": state_dict}`, as accelerate does, has keys `model.<name>`. So has a bare state dict of a
    model with a part called `model`, so the keys do not tell; the paths to them that DCP keeps do, for the names in a
    state dict are keys of one level. What is beside `model` (an optimizer's state) is then no weight of the model.
    """
    inner = {key: paths[key][1:] for key in keys if len(paths.get(key, ())) > 1 and paths[key][0] == "model"}
    return {key: ".".join(map(str, path)) for key, path in inner.items()} or {key: str(key) for key in keys}


def _counts(value: Any) -> tuple[int, ...]:
    if not (isinstance(value, tuple) and all(type(count) is int and count >= 0 for count in value)):
        raise TypeError(f"{value!r} is no shape")
    return value


def _piece(key: str, header: Header, offsets: tuple[int, ...], shape: tuple[int, ...], info: Any) -> _Piece:
    file, start, length = str(info["relative_path"]), info["offset"], info["length"]
    # Windows' rules split at `/` too.
    if PureWindowsPath(file).name != file or file in ("", ".."):
        raise CheckpointError(
            f"it places `{key}` in `{file}`, which is not a file of its own folder. Only files beside it are read."
        )
    if info.state.get("transform_descriptors"):
        raise CheckpointError(f"it holds `{key}` compressed or encrypted. Save it without extensions.")
    inside = len(offsets) == len(shape) == len(header.shape) and all(
        at + size <= whole for at, size, whole in zip(offsets, shape, header.shape, strict=True)
    )
    _counts((start, length))
    if not inside or math.prod(shape) * header.dtype.itemsize > length:
        raise CheckpointError(f"a piece of `{key}` does not fit: {list(shape)} at {list(offsets)}, in {length} bytes.")
    return _Piece(offsets, shape, file, start, length)
