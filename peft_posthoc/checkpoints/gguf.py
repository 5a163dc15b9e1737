"""GGUF files: the tensors of llama.cpp under its own names, decoded by the `gguf` package when they are read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.gguf_blocks import decode
from peft_posthoc.checkpoints.gguf_header import header_alone
from peft_posthoc.checkpoints.gguf_steps import beside, gaps
from peft_posthoc.checkpoints.model_files import state_of
from peft_posthoc.compute.workers import Workers
from peft_posthoc.errors import CheckpointError, MissingExtraError
from peft_posthoc.files import regular

SUFFIX = ".gguf"
# One file of several: `model-00002-of-00003.gguf`.
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MODEL = re.compile(r"(?!mmproj|.*imatrix)[^/]+\.gguf")
# Values that are decoded at a time: where they are fewer, threads wait for each other's Python.
_AT_A_TIME = 1 << 19
# What numpy has no word for is handed over as bytes.
_PLAIN = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
}


class _Place(NamedTuple):
    """Where a tensor is, and its type, one of `gguf.GGMLQuantizationType`."""

    file: Path
    begin: int
    end: int
    type: Any


class Gguf(Checkpoint):
    """A model in a GGUF file, or in several that it was split into."""

    def __init__(self, path: Path, *, label: str, revision: str | None = None) -> None:
        """Map the files, and read their headers.

        Args:
            path: The file, or one of several.
            label: What the user called it.
            revision: Its commit, if it is from the hub.

        Raises:
            CheckpointError: A file is missing, cannot be read, or holds what `gguf` does not decode.
            MissingExtraError: `gguf` is not installed.
        """
        self.label, self.revision = label, revision
        self.files = [path.absolute().with_name(name) for name in split_names(path.name)]
        """The first has the metadata."""
        self._states = {}
        if missing := [file.name for file in self.files if not file.exists()]:
            raise CheckpointError(
                f"`{label}` is one of {len(self.files)} files of a model; beside it is no {', '.join(missing)}."
            )
        self._tensors: dict[str, _Place] = {}
        self._mapped: dict[Path, Any] = {}
        self.headers: dict[str, Header] = {}
        self.types: dict[str, str] = {}
        """By tensor, how its values are stored, as `gguf` calls it: `Q4_K`."""
        self.metadata: Mapping[str, Any] = {}
        """What the file says of the model, lists left out."""
        for file in self.files:
            self._states[file] = state_of(regular(file))
            self._open(file)
        coded = [name for name, kind in self.types.items() if kind not in _PLAIN]
        scales = {name: f"{name.removesuffix('weight')}scale" for name in coded}
        self._scales = {name: self.read(scale) for name, scale in scales.items() if scale in self.types}
        for name in self._scales:
            del self.headers[scales[name]]
        own = [[str(file.parent.resolve()), file.name, *state[1:]] for file, state in self._states.items()]
        self.identity: Any = own if revision is None else [label, revision]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the kind of model."""
        return str(self.metadata.get("general.architecture") or "")

    def _open(self, file: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise MissingExtraError(
                f"`{file}` is read with the gguf package: `pip install 'peft-posthoc[quantised]'`."
            ) from error
        import numpy as np

        try:
            with header_alone(file) as (short, gone):
                reader = gguf.GGUFReader(short)
                # A private mapping: nothing is written to it, and PyTorch takes no other without a warning.
                self._mapped[file] = np.memmap(file, mode="c")
                if file == self.files[0]:
                    single = ((name, field) for name, field in reader.fields.items() if len(field.types) == 1)
                    self.metadata = {name: field.contents() for name, field in single if field.data}
        except Exception as error:
            # Of damaged bytes the reader makes errors of every kind.
            raise CheckpointError(
                f"`{file}` is not a readable GGUF file: {type(error).__name__}: {str(error).rstrip('.')}."
            ) from error
        for tensor in reader.tensors:
            self._add(file, tensor, int(tensor.data_offset) + gone)

    def _add(self, file: Path, tensor: Any, begin: int) -> None:
        name, kind = str(tensor.name), tensor.tensor_type.name
        if name in self.headers:
            raise CheckpointError(f"Two files of `{self.label}` hold `{name}`; one of them is `{file.name}`.")
        if kind not in _PLAIN and not _decodes(tensor.tensor_type):
            raise CheckpointError(
                f"`{self.label}` holds `{name}` as {kind}, which the installed gguf does not decode. Update it, or "
                "give the model in another type."
            )
        shape = tuple(int(side) for side in reversed(tensor.shape))
        self.headers[name] = Header(shape, _PLAIN.get(kind, torch.float32))
        self.types[name] = kind
        self._tensors[name] = _Place(file, begin, begin + int(tensor.n_bytes), tensor.tensor_type)

    def read(self, name: str) -> Tensor:
        """One tensor, decoded to float32 if it is quantised.

        Raises:
            CheckpointError: Its file changed meanwhile.
        """
        stored, (shape, dtype) = self._stored(name), self.headers[name]
        if self.types[name] in _PLAIN:
            return torch.from_numpy(stored).view(dtype).view(shape)
        return self._scaled(name, self._decoded(name, stored))

    def steps(self, name: str) -> Tensor | None:
        """Of a quantised tensor, the grid's step at each value; None of any other."""
        if self.types[name] in _PLAIN:
            return None
        stored, kind = self._stored(name), self._tensors[name].type
        values, next_ones = self._decoded(name, stored), beside(stored, kind)
        found = gaps(values) if next_ones is None else values.sub_(self._decoded(name, next_ones)).abs_()
        return self._scaled(name, found)

    def coded_as(self, name: str) -> str | None:
        """The name of the format, of a quantised tensor."""
        return None if self.types[name] in _PLAIN else "GGUF"

    def _stored(self, name: str) -> Any:
        import numpy as np

        file, begin, end, _ = self._tensors[name]
        if state_of(file) != self._states[file]:
            raise CheckpointError(f"`{file}` changed while it was read. Start again when nothing writes to it.")
        # Of a plain array slices are cheap, of a mapping they are not.
        return np.asarray(self._mapped[file][begin:end])

    def _decoded(self, name: str, blocks: Any) -> Tensor:
        import gguf

        kind = self._tensors[name].type
        found = torch.empty(self.headers[name].shape)
        # Every block is decoded by itself.
        per_block, size = gguf.GGML_QUANT_SIZES[kind]
        values, stored = found.view(-1, per_block), torch.from_numpy(blocks).view(-1, size)
        step = _AT_A_TIME // per_block
        starts = range(0, len(stored), step)
        threads = max(min(torch.get_num_threads(), len(starts)), 1)

        def some(first: int) -> None:
            for at in starts[first::threads]:
                decode(stored[at : at + step], kind, values[at : at + step])

        with Workers(threads, torch_threads=1) as workers:  # NumPy works on one core.
            list(workers.map(some, range(threads)))
        return found

    def _scaled(self, name: str, values: Tensor) -> Tensor:
        """Times what NVFP4 has beside its blocks: a scale for the tensor, or for each expert's matrix."""
        scale = self._scales.get(name)
        return values if scale is None else values.mul_(scale.view(-1, *[1] * (values.dim() - 1)))


def split_names(name: str) -> list[str]:
    """The names of all files of the model that a GGUF file of this name holds, or is a part of, in their order."""
    named = _SPLIT.fullmatch(name)
    if named is None:
        return [name]
    count = int(named["count"])
    return [f"{named['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def only_model(names: Collection[str], where: str) -> str | None:
    """The GGUF file among names that holds a model, or begins one; None if there is none.

    Args:
        names: What a place holds. What sees pictures for a model is no model itself.
        where: The place.

    Raises:
        CheckpointError: There are several.
    """
    models = sorted(name for name in names if _MODEL.fullmatch(name) and split_names(name)[0] == name)
    if len(models) > 1:
        raise CheckpointError(
            f"`{where}` holds {len(models)} models in GGUF: {', '.join(models[:5])}. Give one of them: "
            f"`{where}/{models[0]}`."
        )
    return models[0] if models else None


def _decodes(kind: Any) -> bool:
    """Whether `gguf` has the arithmetic of a type, which it says when it is asked for a block."""
    import gguf
    import numpy as np

    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
