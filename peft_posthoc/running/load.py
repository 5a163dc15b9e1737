"""Models of transformers, loaded from checkpoints without any code of theirs; an adapter put on by PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch

from peft_posthoc.adapters.config import read_config, try_patterns
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import AdapterError, CheckpointError, PosthocError
from peft_posthoc.files import check_folder
from peft_posthoc.models.by_class import check_counts
from peft_posthoc.models.remote_code import without_code


def load_model(
    checkpoint: Checkpoint, cls: Any, device: torch.device, dtype: torch.dtype | Literal["auto"] = torch.float32
) -> Any:
    """The model of a checkpoint that lies in a folder.

    Args:
        checkpoint: With a folder.
        cls: Its class in transformers.
        device: Where it goes.
        dtype: What it computes in; `auto`: the file's own.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    folder = checkpoint.folder
    if folder is None:
        raise ValueError(f"`load_model(checkpoint=...)` needs one in a folder. Got `{checkpoint.label}`.")
    with told_of(checkpoint):
        config = config_of(checkpoint, cls)
        model = cls.from_pretrained(folder, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False)
        return model.to(device).eval()


def config_of(checkpoint: Checkpoint, cls: Any) -> Any:
    """The configuration of a checkpoint that lies in a folder, as transformers reads it, without code that it names."""
    check_folder(folder := checkpoint.folder or "")
    check_counts(checkpoint.config or {})
    config = cls.config_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Models within the model are made from its configuration, and ask about the code that it names.
    return cls.config_class.from_dict(without_code(config.to_dict()))


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
