"""Checkpoints on disk: safetensors or PyTorch files, in a folder or alone, single or sharded, a tensor at a time."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pickle
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peft_posthoc.checkpoint import Header, once
from peft_posthoc.errors import CheckpointError
from peft_posthoc.json_file import read_json
from peft_posthoc.regular import regular

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE = "pytorch_model.bin"
# A diffusers component's; its variants (`.fp16.`, `.non_ema.`) lie beside it.
DIFFUSERS = "diffusion_pytorch_model"
# Of a diffusers pipeline, which is several models in folders of their own.
PIPELINE = "model_index.json"
# What a single file of weights may end in.
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def weight_files(names: Collection[str]) -> list[str]:
    """The files among `names` that hold the weights: an index alone, one file, or several files without an index.

    Safetensors come before pickles, and the usual names before others. A single file comes before an index, as in
    transformers: a folder that is saved into twice may keep the older form beside the newer one. A pipeline has none.
    """
    if PIPELINE in names:
        return []
    for usual in (SAFETENSORS, SAFETENSORS_INDEX, f"{DIFFUSERS}.safetensors", f"{DIFFUSERS}.safetensors.index.json"):
        if usual in names:
            return [usual]
    top = sorted(name for name in names if "/" not in name)
    indexes = [name for name in top if ".safetensors.index." in name and is_index(name)]
    if len(indexes) == 1:
        return indexes
    # `consolidated.safetensors` holds the same model under other names (Mistral's own format).
    others = [n for n in top if n.endswith(".safetensors") and not n.startswith(("adapter_", "consolidated"))]
    if others:
        return others
    for usual in (PICKLE, PICKLE_INDEX, f"{DIFFUSERS}.bin", f"{DIFFUSERS}.bin.index.json"):
        if usual in names:
            return [usual]
    return []


def is_index(name: str) -> bool:
    """Whether the file of that name is an index of shards; a variant's is `.safetensors.index.fp16.json`."""
    return ".index." in name and name.endswith(".json")


def no_weights(what: str, names: Collection[str], *, parts: Collection[str] = ()) -> str:
    """What to say of a place that holds these files, none of them with weights; `parts` of it are models."""
    if PIPELINE in names:
        choice = f": {', '.join(f'`{part}`' for part in parts)}" if parts else ", from a local folder"
        return f"{what} is a diffusers pipeline of several models; an adapter is for one. Give one of them{choice}."
    held = ", ".join(sorted(names)[:5]) or "nothing"
    return f"No weights in {what} (it holds {held}). Looked for {SAFETENSORS}, {PICKLE}, or an index of shards."


def shards_of(index: Path) -> dict[str, str]:
    """Tensor name to file name, as the index says. A shard must lie beside its index.

    Raises:
        CheckpointError: The index is no valid one, or names a file outside of its folder.
    """
    try:
        read = read_json(index, unique=True)
    except ValueError as error:
        raise CheckpointError(f"`{index}` is not a valid index of shards: {error}.") from error
    weight_map = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"`{index}` is not a valid index of shards: it has no object `weight_map`.")
    pairs = {tensor: str(file) for tensor, file in weight_map.items()}
    for tensor, file in pairs.items():
        outside = PurePosixPath(file).name != file or PureWindowsPath(file).name != file or file in ("", ".", "..")
        if outside:
            raise CheckpointError(
                f"`{index}` places `{tensor}` in `{file}`, which is not a file of its own folder. Refused: only files "
                "beside the index are read."
            )
    return pairs


class Folder:
    """A folder as `save_pretrained` writes it. Tensors are mapped from disk, and read when asked for."""

    revision: str | None = None
    module: nn.Module | None = None
    sequential = False

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
        for file in chosen:
            self._add(file, _opened(folder / file))
        # A commit on the hub is its own: wherever, and whenever, its files are.
        own = [_identity(folder / file) for file in chosen]
        self.identity: Any = own if revision is None else [label, revision]
        absent = [tensor for tensor in listed or () if tensor not in self.headers]
        if absent:
            raise CheckpointError(f"The index of `{label}` lists tensors that no shard holds: {', '.join(absent[:5])}.")

    def _add(self, name: str, file: _Safetensors | _Pickle) -> None:
        for tensor, header in file.headers.items():
            if tensor in self.headers:
                raise CheckpointError(f"Two files of `{self.label}` hold `{tensor}`; one of them is `{name}`.")
            self.headers[tensor] = header
            self._files[tensor] = file
            self.files[tensor] = name

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file."""
        return self._files[name].read(name)


class File:
    """A single file of weights, as models are passed around without a folder. It brings no configuration."""

    revision: str | None = None
    folder: Path | None = None
    module: nn.Module | None = None
    config: Mapping[str, Any] | None = None
    sequential = False

    def __init__(self, path: Path, *, label: str) -> None:
        self.label = label
        self._file = _opened(path)
        self.headers: Mapping[str, Header] = self._file.headers
        self.identity: Any = [_identity(path)]

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from the file."""
        return self._file.read(name)


def dtype_of(code: str, where: str, name: str) -> torch.dtype:
    """The type that safetensors calls so.

    Raises:
        CheckpointError: It is not supported.
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
            if _state(os.fstat(file.fileno())) != self._state:
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


def state_of(path: Path) -> tuple[int, int, int]:
    """What is no longer the same once a file was replaced or written to."""
    return _state(path.stat())


def _state(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


class _Pickle:
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
    """Whether it is a tensor with a value for each of its elements."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_meta or value.is_nested)
    )


def _special_float(read: dict[str, Any]) -> Any:
    """What transformers 5 writes for infinity: `{"__float__": "Infinity"}` (Mamba2's configuration has one)."""
    return float(read["__float__"]) if read.keys() == {"__float__"} else read


def config_of(folder: Path) -> Mapping[str, Any] | None:
    """The model's configuration in a folder, if there is one.

    Raises:
        CheckpointError: It cannot be read.
    """
    path = folder / "config.json"
    if not path.exists() or path.is_dir():
        return None
    try:
        config = read_json(path, hook=_special_float)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"`{path}` is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"`{path}` is not a configuration: expected a JSON object.")
    architectures, model_type = config.get("architectures") or [], config.get("model_type") or ""
    if not (isinstance(architectures, list) and all(isinstance(name, str) for name in [*architectures, model_type])):
        raise CheckpointError(f"`{path}` is not a configuration: `architectures` or `model_type` is no name.")
    for key in ("text_config", "quantization_config"):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"`{path}` is not a configuration: `{key}` is no object.")
    if not all(isinstance(part.get("vocab_size") or 0, int) for part in (config, config.get("text_config") or {})):
        raise CheckpointError(f"`{path}` is not a configuration: `vocab_size` is no whole number.")
    return config
