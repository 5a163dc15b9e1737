"""A model with an adapter on it as a checkpoint: what PEFT computes with the two, a tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.adapters.open import open_adapter
from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.adapters.vocabulary import resize_of
from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header, place_of
from peft_posthoc.checkpoints.model_files import state_of
from peft_posthoc.checkpoints.quantized.undecoded import refuse_codes
from peft_posthoc.models.find import layout_of


class Applied(Checkpoint):
    """A checkpoint with a PEFT LoRA adapter on it. What it changes is in float32, not rounded to the base's dtype.

    A tensor that two modules share, of which the adapter changes one, or each in its own way, is no longer shared: the
    second one's is a new tensor.
    """

    doubt: str | None = None
    """A sentence about a base that is not the one which the adapter names."""
    handed = True

    def __init__(
        self, base: Checkpoint, adapter: Path | AdapterFile, *, label: str, revision: str | None = None
    ) -> None:
        """Put an adapter on a checkpoint.

        Args:
            base: The model.
            adapter: The adapter, or its folder.
            label: What messages and reports call the two.
            revision: The adapter's commit, if it is from the hub.

        Raises:
            AdapterError: It does not fit, or is more than base + b @ a.
            CheckpointError: The base holds quantised what it changes.
        """
        self.label = label
        self.revision = revision
        self.sequential, self.to_fetch = base.sequential, base.to_fetch
        self.to_stream: int = getattr(base, "to_stream", 0)
        folder = open_adapter(adapter, base.headers) if isinstance(adapter, Path) else adapter
        layout = layout_of(base)
        # A tokenizer that was changed lies beside the adapter.
        own = (folder.place / "tokenizer_config.json").is_file()
        self.beside = folder.place if own else place_of(base)
        adapted = tuple(f"{module}." for module in folder.modules)
        why = f"`{folder.label}` adds to it: its numbers need their scales"
        refuse_codes(base, why, lambda name: any(own.startswith(adapted) for own in layout.names_of(name)))
        self._on = AdapterOnModel(folder, base, layout)
        size = resize_of(self._on)
        self.config = base.config if size is None or base.config is None else size.config(base.config)
        self._made = self._changed()
        self.headers: Mapping[str, Header] = dict(self._on.base.headers) | {
            name: self._header(own, source) for name, (own, source) in self._made.items()
        }
        states = [[str(file.parent.resolve()), file.name, *state_of(file)[1:]] for file in folder.files]
        self.identity: Any = [base.identity, states] if base.identity is not None else None

    def read(self, name: str) -> Tensor:
        """One tensor of the base, with what the adapter makes of it."""
        if name not in self._made:
            return self._on.base.read(name)
        dtype = self.headers[name].dtype
        _, after = self._on.read(*self._made[name], dtype)
        return after.to(dtype)

    def _changed(self) -> dict[str, tuple[str, str | None]]:
        """Names of the tensors that are made; each with the model's own name, and the base's tensor it is made from."""
        on, layout = self._on, self._on.layout
        made: dict[str, tuple[str, str | None]] = {}
        used: set[str] = set()
        for name in on.base.headers:
            first, *others = names = layout.names_of(name)
            used.update(names)
            if on.changes(first):
                made[name] = first, name
            made |= {own: (own, name) for own in others if own not in on.base.headers and not on.alike(first, own)}
        # What the adapter alone has: a new head, LoRA's bias of a layer that has none.
        alone = [*(f"{module}.bias" for module in on.biases), *on.replaced]
        return made | {name: (name, None) for name in alone if name not in used}

    def _header(self, own: str, source: str | None) -> Header:
        on = self._on
        if key := on.replaced.get(own):
            header = on.folder.headers[key]
        elif source is not None:
            header = on.base.headers[source]
        else:
            header = Header((on.folder.modules[own.rpartition(".")[0]].size[0],), torch.float32)
        return Header(header.shape, torch.promote_types(header.dtype, torch.float32)) if on.adds(own) else header
