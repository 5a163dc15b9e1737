"""DeepSpeed's ZeRO checkpoints (stages 1 to 3), read with DeepSpeed's own converter.

The converter unpickles whatever its files hold. Here PyTorch is made to load them as weights only, with DeepSpeed's own
few classes of plain values beside tensors: nothing in a file can run.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.folder import is_plain
from peft_posthoc.checkpoints.model_files import config_of, home_of, weight_files
from peft_posthoc.errors import CheckpointError, MissingExtraError
from peft_posthoc.files import check_folder

LATEST = "latest"
_OPTIMIZER = "*_optim_states.pt"
_MODEL = "*_model_states.pt"
# Reads every `torch.load` of the process as weights only, one with `weights_only=False` too.
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def find_partitions(folder: Path) -> Path | None:
    """The folder of partitions that a model has to be read from: `folder` itself, or the one within it.

    None where the folder holds weights of another kind: they are easier to read. Which of several it is says a file
    named `latest`, as DeepSpeed keeps it.

    Raises:
        CheckpointError: The folder holds several and does not say which; or what it says is not there.
    """
    if weight_files({path.name for path in folder.iterdir()}):
        return None
    if _holds_partitions(folder):
        return folder
    latest = folder / LATEST
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and _holds_partitions(path))
    if not latest.is_file():
        if len(inner) > 1:
            names = ", ".join(path.name for path in inner)
            raise CheckpointError(f"`{folder}` holds several ZeRO checkpoints ({names}). Give one of these folders.")
        return inner[0] if inner else None
    try:
        tag = latest.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{latest}` cannot be read: {error}.") from error
    # Windows' rules split at `/` too.
    if not tag or PureWindowsPath(tag).name != tag or tag == "..":
        raise CheckpointError(
            f"`{latest}` names `{tag[:100]}`, which is not a folder beside it. Give the folder itself."
        )
    if folder / tag not in inner:
        held = f"It holds {', '.join(path.name for path in inner)}" if inner else "There is no other"
        raise CheckpointError(f"`{latest}` names `{tag}`, which holds no ZeRO checkpoint. {held}.")
    return folder / tag


def _holds_partitions(folder: Path) -> bool:
    return any(True for pattern in (_OPTIMIZER, _MODEL) for _ in folder.glob(pattern))


class Zero(Checkpoint):
    """A folder of partitions. Tensors are the optimizer's float32, not their rounding to the model's dtype.

    Of stage 3 each tensor is put together when it is asked for. DeepSpeed's converter puts together all of stages 1 and
    2 at once: they take the whole model's size in memory.
    """

    def __init__(self, folder: Path, partitions: Path, *, label: str) -> None:
        """Open the partitions of a model.

        Args:
            folder: What the user gave; `config.json` lies there, or beside the partitions' folder.
            partitions: The folder of partitions, as `find_partitions` gives it.
            label: What messages call it.

        Raises:
            CheckpointError: The partitions are incomplete, damaged, or hold more than DeepSpeed's own plain values.
            MissingExtraError: DeepSpeed is not installed.
        """
        self.label = label
        self.beside = home_of(folder, partitions)
        self.config = config_of(self.beside)
        files = sorted(path for pattern in (_OPTIMIZER, _MODEL) for path in partitions.glob(pattern))
        self.identity: Any = [
            [str(partitions.resolve()), path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files
        ]
        # A tied weight is there under each of its names: one object.
        seen: set[int] = set()
        self._tensors: dict[str, Any] = {}
        for name, tensor in _converted(partitions, label).items():
            if id(tensor) not in seen:
                self._tensors[name] = tensor
            seen.add(id(tensor))
        strangers = [name for name, value in self._tensors.items() if isinstance(value, Tensor) and not is_plain(value)]
        if strangers:
            raise CheckpointError(f"`{label}` is refused: `{strangers[0]}` is no plain tensor.")
        self.headers: Mapping[str, Header] = {
            name: Header(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, put together from its partitions.

        Raises:
            CheckpointError: The partitions do not make up the tensor.
        """
        try:
            tensor: Tensor = self._tensors[name].contiguous()
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            first = str(error).splitlines()[0]
            raise CheckpointError(
                f"The partitions of `{name}` in `{self.label}` do not make up a tensor: {first}"
            ) from error
        return tensor.detach()


def _converted(partitions: Path, label: str) -> Mapping[str, Any]:
    """All tensors by name, as DeepSpeed's converter gives them; of stage 3 each is put together by `contiguous()`."""
    check_folder(partitions)
    convert, classes = _deepspeed(label)
    parent = partitions.absolute().parent
    advice = (
        "Where you trust it, convert it with what DeepSpeed put beside it: "
        "`python zero_to_fp32.py . OUT --safe_serialization`."
    )
    try:
        with _weights_only(), torch.serialization.safe_globals(classes), _silence():
            found: Mapping[str, Any] = convert(str(parent), tag=partitions.name, lazy_mode=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"`{label}` is refused: a pickle in it holds more than tensors and DeepSpeed's plain values, or is "
            f"damaged. Nothing of it was executed. {advice}"
        ) from error
    except Exception as error:
        # Missing keys, files and values all fail in their own ways.
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"DeepSpeed's converter cannot read `{label}` ({type(error).__name__}: {first[:300].rstrip('.')}). Give "
            "all files of all processes in one folder."
        ) from error
    return found


def _deepspeed(label: str) -> tuple[Callable[..., Mapping[str, Any]], list[Any]]:
    """DeepSpeed's converter, and the classes of plain values that its checkpoints hold."""
    try:
        # DeepSpeed remarks on the machine on stdout, where machines read our JSON.
        with contextlib.redirect_stdout(sys.stderr):
            from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
            from deepspeed.runtime.zero.config import ZeroStageEnum
            from deepspeed.utils.tensor_fragment import fragment_address
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise MissingExtraError(
            f"`{label}` is a ZeRO checkpoint, which needs DeepSpeed ({error}): "
            "`pip install 'peft-posthoc[deepspeed]'`. Or convert it where DeepSpeed is, in its folder: "
            "`python zero_to_fp32.py . OUT --safe_serialization`."
        ) from error
    return get_fp32_state_dict_from_zero_checkpoint, [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The converter prints what it does, and shows progress bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
