"""The model that an adapter is to be served on: its class and the headers of its tensors, none read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import CheckpointError
from peft_posthoc.models.find import layout_of
from peft_posthoc.models.layout import Layout
from peft_posthoc.models.slots import Slot, slots_of
from peft_posthoc.sources import open_checkpoint


@dataclass(frozen=True)
class Served:
    """The model that the adapter is to be served on: its class and the headers of its tensors."""

    checkpoint: Checkpoint
    layout: Layout
    slots: Mapping[str, Slot]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Served:
        """Read a model folder's configuration and headers.

        Raises:
            CheckpointError: It is no model folder.
        """
        if not Path(folder).is_dir():
            raise CheckpointError(f"The base `{folder}` is no folder. Give the folder of the model to be served.")
        checkpoint = open_checkpoint(folder, role="base")
        layout = layout_of(checkpoint)
        return cls(checkpoint, layout, slots_of(checkpoint.headers, layout))

    @property
    def model_type(self) -> str:
        """As the configuration calls it."""
        return str((self.checkpoint.config or {}).get("model_type") or "")

    @property
    def vocabulary(self) -> int | None:
        """Its size, where the configuration tells it."""
        config = self.checkpoint.config or {}
        size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
        return int(size) if size else None

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        layout = self.layout
        return any(layout.head in {owner, *users} for owner, users in layout.ties.items() if users)
