"""A model as its configuration and the headers of its tensors show it; no tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.models.as_model import as_model
from peft_posthoc.models.find import layout_of
from peft_posthoc.models.layout import Layout
from peft_posthoc.models.slots import Slot, slots_of


@dataclass(frozen=True)
class Model:
    """A model: its class and the headers of its tensors."""

    checkpoint: Checkpoint
    layout: Layout
    slots: Mapping[str, Slot]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Model:
        """The model of a checkpoint, by its configuration and headers."""
        layout = layout_of(checkpoint)
        checkpoint = as_model(checkpoint, layout)
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
        """True if the head's weight is the embedding's."""
        layout = self.layout
        return any(layout.head in {owner, *users} for owner, users in layout.ties.items() if users)
