"""Models of transformers, loaded from checkpoints without any code of theirs; an adapter put on by PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from peft_posthoc.adapters.config import read_config, try_patterns
from peft_posthoc.checkpoints.checkpoint import Checkpoint, place_of
from peft_posthoc.checkpoints.modules import module_of
from peft_posthoc.checkpoints.view import as_handed
from peft_posthoc.errors import AdapterError, CheckpointError, PosthocError
from peft_posthoc.files import check_folder
from peft_posthoc.models.by_class import check_counts
from peft_posthoc.models.config import of_plain_layers
from peft_posthoc.models.from_gguf import OfGguf
from peft_posthoc.models.remote_code import without_code


def is_loadable(checkpoint: Checkpoint) -> bool:
    """Tell whether a checkpoint is a model in a folder, on the hub or in a file, of which all is known."""
    found = as_handed(checkpoint)
    whole = isinstance(found, OfGguf) or (found is not None and bool(found.config) and place_of(found) is not None)
    return whole or checkpoint.folder is not None


def load_model(
    checkpoint: Checkpoint,
    cls: Any,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    *,
    drawn: list[str] | None = None,
) -> Any:
    """The model of a checkpoint.

    Codes are decoded as everywhere here, a tensor at a time, into a model of plain layers: for most kinds of codes
    transformers has no kernels on a CPU, and needs a library for each. A base with an adapter is handed over likewise.

    Args:
        checkpoint: One that is loadable.
        cls: Its class in transformers.
        device: Where it goes.
        dtype: What it computes in; `auto`: the file's own, and float32 of what is handed over.
        drawn: Gets the names of weights that the folder lacks, which transformers then draws. Without it none may be.

    Raises:
        CheckpointError: transformers cannot load it, or it lacks a weight.
    """
    if not is_loadable(checkpoint):
        raise ValueError(f"`load_model(checkpoint=...)` needs one in a folder. Got `{checkpoint.label}`.")
    handed = as_handed(checkpoint)
    with told_of(checkpoint):
        config = config_of(checkpoint, cls)
        if handed is not None:
            model = _of_tensors(handed, cls, config, torch.float32 if dtype == "auto" else dtype)
            write_as_told(model, handed)
        else:
            model, told = cls.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
            if drawn is None:
                _check_whole(checkpoint, cls, told)
            else:
                drawn += sorted(told["missing_keys"])
        return model.to(device).eval()


def config_of(checkpoint: Checkpoint, cls: Any) -> Any:
    """The configuration of a checkpoint that is loadable, without code that it names, and of plain layers."""
    check_counts(checkpoint.config or {})
    if (handed := as_handed(checkpoint)) is not None:
        return cls.config_class.from_dict(of_plain_layers(without_code(handed.config or {})))
    folder: Any = checkpoint.folder
    check_folder(folder)
    config = cls.config_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Models within the model are made from its configuration, and ask about the code that it names.
    return cls.config_class.from_dict(without_code(config.to_dict()))


def write_as_told(model: Any, checkpoint: Checkpoint) -> None:
    """Let a model write as what lies beside its checkpoint says: where text ends, and how it is drawn."""
    from transformers import GenerationConfig

    place = place_of(checkpoint)
    if place is not None and (place / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(
            place, local_files_only=True, trust_remote_code=False
        )


@contextmanager
def told_of(checkpoint: Checkpoint) -> Iterator[None]:
    """Tell in one line what transformers says of a checkpoint that it cannot load."""
    try:
        yield
    except PosthocError:
        raise
    except Exception as error:
        # Each class fails in its own way on a configuration that it does not expect.
        raise CheckpointError(
            f"transformers cannot load `{checkpoint.label}`: {type(error).__name__}: {error}"
        ) from error


def _of_tensors(checkpoint: Checkpoint, cls: Any, config: Any, dtype: torch.dtype) -> Any:
    from transformers import __version__

    weights: dict[str, Any] = {name: _Read(checkpoint, name) for name in checkpoint.headers if not module_of(name)}
    if int(__version__.partition(".")[0]) < 5:  # It takes tensors alone, all at once.
        weights = {name: one[...] for name, one in weights.items()}
    model, told = cls.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, trust_remote_code=False
    )
    _check_whole(checkpoint, cls, told)
    return model


def _check_whole(checkpoint: Checkpoint, cls: Any, told: Mapping[str, Any]) -> None:
    """See that transformers had to draw no weight."""
    if missing := sorted(told["missing_keys"]):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(
            f"`{checkpoint.label}` lacks weights of a {cls.__name__}: {', '.join(missing[:5])}{more}."
        )


class _Read:
    """A tensor that is read when transformers takes it, as it takes a slice of a safetensors file."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, part: Any) -> Tensor:
        return self._checkpoint.read(self._name)[part]


def with_adapter(model: Any, adapter: str | PathLike[str], *, empty: bool = False) -> Any:
    """The model with an adapter on it, as PEFT loads it.

    Args:
        model: transformers'.
        adapter: A folder.
        empty: Whether the model has no weights; the adapter then has none either.

    Raises:
        AdapterError: PEFT cannot, or would be held up without end by a pattern.
    """
    import peft

    check_folder(adapter)
    try_patterns(read_config(Path(adapter)), [name for name, _ in model.named_modules()], adapter)
    try:
        return peft.PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=empty)
    except Exception as error:
        raise AdapterError(f"PEFT cannot load `{adapter}`: {type(error).__name__}: {error}") from error


def rows_of(model: Any) -> int | None:
    """Rows of the token embeddings; None of a model that reads no tokens."""
    try:
        return len(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError):
        return None


def save_adapter(model: Any, folder: str | PathLike[str], name: str) -> Path:
    """Write an adapter that is on a live model, as PEFT does.

    Args:
        model: PEFT's.
        folder: Where to.
        name: The adapter's on the model.

    Returns:
        The folder that it is in.

    Raises:
        AdapterError: There is none of this name, or PEFT cannot write it.
    """
    held = list(getattr(model, "peft_config", ()))
    if name not in held:
        raise AdapterError(
            f"The {type(model).__name__} holds no adapter `{name}`. It holds {', '.join(held) or 'none'}."
        )
    try:
        # Rows of the base are not the adapter's; and PEFT would ask the hub about them.
        model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    except Exception as error:
        raise AdapterError(f"PEFT cannot write adapter `{name}`: {type(error).__name__}: {error}") from error
    return Path(folder) if name == "default" else Path(folder) / name
