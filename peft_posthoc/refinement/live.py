"""Live models for a fit: the tuned model, and base + adapter with factors that can move, as logits of batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from peft_posthoc.adapters.open import open_adapter
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import AdapterError, CheckpointError, MismatchError
from peft_posthoc.models.by_class import class_of
from peft_posthoc.refinement.distance import Model, Score, distances
from peft_posthoc.refinement.sequences import Batch, Tokens
from peft_posthoc.running.inputs import tokenizer_of
from peft_posthoc.running.load import is_loadable, load_model, rows_of, with_adapter

_FACTORS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}


@dataclass(frozen=True)
class Live:
    """A tuned model, and its base with an adapter on it."""

    adapted: Any
    """PEFT's model."""
    tuned: Any
    tokenizer: Any
    """transformers', or None."""
    vocabulary: int
    """Tokens that both know."""

    @property
    def device(self) -> torch.device:
        """Where they are."""
        found: torch.device = next(self.tuned.parameters()).device
        return found

    def distances(self, texts: Sequence[Tokens], *, size: int) -> Score:
        """How far base + adapter is from the tuned model, on texts of each kind, `size` at a time."""
        return distances(says(self.adapted), says(self.tuned), texts, size=size, device=self.device)


def load_live(base: Checkpoint, tuned: Checkpoint, adapter: str | PathLike[str], device: torch.device) -> Live:
    """Load both models and put the adapter on the base.

    Raises:
        AdapterError: PEFT cannot load the adapter.
        CheckpointError: A model cannot be loaded, or is none that says next tokens.
        MismatchError: They are of two classes, or know other tokens.
    """
    names = [((one.config or {}).get("architectures") or [None])[0] for one in (base, tuned)]
    for one in (base, tuned):
        if not is_loadable(one):
            raise CheckpointError(f"`{one.label}` is no model in a folder or on the hub; only such are loaded.")
    if names[0] is None or names[0] != names[1]:
        raise MismatchError(f"The configurations name no common model class ({names[0]} and {names[1]}).")
    cls = class_of(str(names[0]))
    if cls is None or not hasattr(cls, "generate"):
        raise CheckpointError(f"{names[0]} is no language model of transformers: there are no next tokens to fit to.")
    after, before = load_model(tuned, cls, device), load_model(base, cls, device)
    for model in (after, before):
        if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
            raise CheckpointError(f"{names[0]} says no next tokens of a text: only causal language models are refined.")
    rows = [rows_of(model) for model in (before, after)]
    if rows[0] != rows[1]:
        file = open_adapter(adapter)
        if not any(file.headers[name].shape[:1] == (rows[1],) for name in file.whole):
            raise MismatchError(f"`{base.label}` knows {rows[0]} tokens, `{tuned.label}` {rows[1]}.")
        before.resize_token_embeddings(rows[1], mean_resizing=False)
    adapted = with_adapter(before, adapter)
    tokenizer = tokenizer_of(tuned) or tokenizer_of(base)
    vocabulary = min(rows[1] or 0, len(tokenizer) if tokenizer is not None else rows[1] or 0)
    return Live(adapted, after, tokenizer, vocabulary)


def says(model: Any) -> Model:
    """A causal language model as a function of batches to logits."""

    def logits(batch: Batch) -> Tensor:
        found: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        return found

    return logits


def factors_of(model: Any, adapter: str = "default") -> dict[str, Parameter]:
    """The factors of an adapter on a PEFT model, made to be moved; everything else is made not to be.

    Args:
        model: PEFT's, with the adapter active.
        adapter: Its name.

    Returns:
        By the names of the file, which have no adapter's name in them; in float32.

    Raises:
        AdapterError: There are none.
    """
    found = {}
    for name, own in model.named_parameters():
        parts = name.split(".")
        chosen = adapter in parts and not _FACTORS.isdisjoint(parts)
        own.requires_grad_(chosen)
        if chosen:
            own.data = own.data.float()
            found[name.replace(f".{adapter}", "", 1)] = own
    if not found:
        raise AdapterError(f"The model holds no LoRA factors of an adapter `{adapter}`.")
    return found
