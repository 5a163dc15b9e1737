"""The class that an adapter will be served with, where it is not the base's own (`--serve-as`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.model_files import config_of
from peft_posthoc.errors import CheckpointError
from peft_posthoc.models.config import architecture
from peft_posthoc.models.layout import Layout
from peft_posthoc.models.remote_code import not_run
from peft_posthoc.text import asked


def layout_to_serve(serve_as: str, *checkpoints: Checkpoint) -> tuple[Layout, dict[str, tuple[int, ...]]]:
    """The layout of a class, and the names and shapes of its tensors.

    Args:
        serve_as: A class of transformers, which the configuration of a checkpoint or its `text_config` is for; or the
            folder of a model of the class.
        *checkpoints: Those that are compared.

    Raises:
        CheckpointError: The folder's class is none of transformers'.
        ValueError: There is no such class, or no configuration for it.
    """
    from peft_posthoc.models.by_class import build
    from peft_posthoc.models.of_module import layout_of_module

    if Path(serve_as).is_dir():
        config = config_of(Path(serve_as)) or {}
    else:
        config = _for_class(serve_as, [checkpoint.config or {} for checkpoint in checkpoints])
    model = build(config)
    if model is None:
        name = architecture(config) or "without a configuration"
        raise CheckpointError(f"`{asked('serve_as', serve_as)}`: transformers has no class {name}{not_run(config)}.")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return layout_of_module(model, type(model).__name__, [one.headers for one in checkpoints]), shapes


def _for_class(name: str, configs: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A configuration for that class, found among these or in their `text_config`.

    Raises:
        ValueError: There is no such class, or no configuration for it.
    """
    from peft_posthoc.models.by_class import class_of

    cls = class_of(name)
    if cls is None:
        raise ValueError(f"`{asked('serve_as', name)}` is neither a folder nor a class of transformers.")
    for config in configs:
        for part in (config, config.get("text_config") or {}):
            if part.get("model_type") == cls.config_class.model_type:
                return {**part, "architectures": [name]}
    wanted = cls.config_class.model_type
    types = ", ".join(sorted({str(config.get("model_type")) for config in configs if config})) or "no configuration"
    raise ValueError(
        f"`{asked('serve_as', name)}` needs the configuration of a {wanted}, and the checkpoints have {types}. "
        "Give the folder of a model that is served so."
    )
