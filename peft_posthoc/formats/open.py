"""An adapter, opened on the model that it belongs to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os.path import exists
from pathlib import Path
from typing import Any

from peft_posthoc.adapters.named_base import base_of
from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.adapters.open import open_adapter
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.gguf import SUFFIX
from peft_posthoc.checkpoints.model_files import config_of
from peft_posthoc.errors import AdapterError, CheckpointError
from peft_posthoc.models.config import architecture
from peft_posthoc.models.find import layout_of
from peft_posthoc.sources import Source, open_checkpoint
from peft_posthoc.text import asked


def open_deltas(
    adapter: str | os.PathLike[str], base: Source | None, *, values: bool, revision: str | None = None
) -> AdapterOnModel:
    """Open an adapter and its base.

    Args:
        adapter: A PEFT LoRA folder.
        base: The model that it is for; None for the one that its configuration names.
        values: Whether the base's weights are needed; otherwise its configuration does.
        revision: Branch, tag or commit, where the base is a hub id.

    Raises:
        AdapterError: The adapter cannot be read, or does not fit the base.
        CheckpointError: The base cannot be read.
    """
    folder = open_adapter(adapter)
    if base is None:
        named = base_of(folder.config)
        if named is None:
            raise AdapterError(f"`{folder.label}` does not say what its base is. Name it with `{asked('base', None)}`.")
        base, revision = named.name, None if exists(named.name) else revision or named.revision
    opened = open_checkpoint(base, revision=revision, role="base") if values else _without_values(base, revision)
    return AdapterOnModel(open_adapter(adapter, opened.headers), opened, layout_of(opened))


def _without_values(base: Source, revision: str | None) -> Checkpoint:
    """The base as its configuration tells of it, on the meta device; itself if it is no folder and no hub id.

    Raises:
        CheckpointError: There is no configuration, or transformers has no class for it.
    """
    if not isinstance(base, str | os.PathLike) or str(base).endswith(SUFFIX) or Path(base).is_file():
        return open_checkpoint(base, revision=revision, role="base")
    from peft_posthoc.checkpoints.hub import fetch_config
    from peft_posthoc.checkpoints.memory import InMemory
    from peft_posthoc.models.by_class import build
    from peft_posthoc.models.remote_code import not_run

    config: Mapping[str, Any] | None
    config = config_of(Path(base)) if Path(base).is_dir() else fetch_config(str(base), revision=revision)
    if config is None:
        # A GGUF has it in its file.
        here = Path(base).is_dir() and not any(path.suffix == SUFFIX for path in Path(base).iterdir())
        opened = None if here else open_checkpoint(base, revision=revision, role="base")
        if opened is None or opened.config is None:
            raise CheckpointError(f"The base `{base}` has no `config.json`.")
        return opened
    model = build(config)
    if model is None:
        raise CheckpointError(
            f"The base `{base}` is a {architecture(config) or 'model without `architectures`'}, which transformers "
            f"has no class for{not_run(config)}."
        )
    made = InMemory(dict(model.named_parameters()), label=str(base), module=model)
    made.config = config
    return made
