"""Models of transformers, loaded from checkpoints without any code of theirs; an adapter put on by PEFT."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch

from peft_posthoc.adapters.config import read_config, try_patterns
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import AdapterError, CheckpointError
from peft_posthoc.files import check_folder
from peft_posthoc.models.by_class import check_counts
from peft_posthoc.models.remote_code import without_code


def load_model(checkpoint: Checkpoint, cls: Any, device: torch.device) -> Any:
    """The model of a checkpoint that lies in a folder, in float32.

    Args:
        checkpoint: With a folder.
        cls: Its class in transformers.
        device: Where it goes.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    folder = checkpoint.folder
    if folder is None:
        raise ValueError(f"`load_model(checkpoint=...)` needs one in a folder. Got `{checkpoint.label}`.")
    check_folder(folder)
    check_counts(checkpoint.config or {})
    try:
        config = cls.config_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Models within the model are made from its configuration, and ask about the code that it names.
        config = cls.config_class.from_dict(without_code(config.to_dict()))
        model = cls.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        return model.to(device).eval()
    except Exception as error:
        # Each class fails in its own way on a configuration that it does not expect.
        raise CheckpointError(
            f"transformers cannot load `{checkpoint.label}`: {type(error).__name__}: {error}"
        ) from error


def with_adapter(model: Any, adapter: str | PathLike[str]) -> Any:
    """The model with an adapter on it, as PEFT loads it.

    Raises:
        AdapterError: PEFT cannot, or would be held up without end by a pattern.
    """
    import peft

    check_folder(adapter)
    try_patterns(read_config(Path(adapter)), [name for name, _ in model.named_modules()], adapter)
    try:
        return peft.PeftModel.from_pretrained(model, str(adapter))
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
