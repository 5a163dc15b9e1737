"""Live models, to fit or to compare: the tuned model, and base + adapter; loaded, or a user's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.memory import loaded_from
from peft_posthoc.compute.together import ALONE, Together
from peft_posthoc.errors import CheckpointError, MismatchError, PosthocError
from peft_posthoc.models.by_class import class_of
from peft_posthoc.models.config import architecture
from peft_posthoc.running.empty import Weights
from peft_posthoc.running.inputs import tokenizer_of
from peft_posthoc.running.load import is_loadable, load_model, rows_of, with_adapter
from peft_posthoc.texts.distance import Model, Score, distances
from peft_posthoc.texts.sequences import Batch, Tokens, places_of

Side = Checkpoint | nn.Module
"""A model that is to be loaded, or one that is alive."""


@dataclass(frozen=True)
class Live:
    """A tuned model, and its base with an adapter on it."""

    adapted: Any
    """PEFT's model."""
    tuned: Any
    tokenizer: Any = None
    """transformers', or None."""
    name: str = "default"
    """The adapter's on the model."""
    weights: tuple[Weights | None, Weights | None] = (None, None)
    """Of models without weights, where each is read while it is needed."""
    together: Together = ALONE
    """Processes that each have both models."""

    @property
    def model(self) -> Any:
        """The model of transformers that the adapter is on. It is called by itself: some PEFTs pass over its hooks."""
        return self.adapted.get_base_model()

    @property
    def device(self) -> torch.device:
        """Where logits are compared."""
        found: torch.device = self.adapted.device
        return found

    @property
    def vocabulary(self) -> int:
        """Tokens that both models know."""
        return min(rows_of(self.adapted) or 0, rows_of(self.tuned) or 0)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text that both models can read; None where their configurations do not say."""
        told = [places_of(model.config) for model in (self.adapted, self.tuned)]
        return min((most for most in told if most), default=None)

    def distances(self, texts: Sequence[Tokens], *, size: int) -> Score:
        """How far base + adapter is from the tuned model, on texts of each kind, `size` at a time."""
        return distances(
            says(self.model),
            says(self.tuned, self.device),
            texts,
            size=size,
            device=self.device,
            together=self.together,
        )

    def check_finite(self) -> None:
        """See that both models say numbers.

        Raises:
            PosthocError: One does not.
        """
        for name, model in (("tuned model", self.tuned), ("base", self.model)):
            check_finite(name, model, self.vocabulary)

    @contextmanager
    def writers(self) -> Iterator[tuple[Any, Any]]:
        """The base and the tuned model, to write with."""
        yield self.adapted, self.tuned


def load_live(
    base: Side,
    tuned: Side,
    adapter: str | PathLike[str],
    file: AdapterFile,
    *,
    device: torch.device,
    tokenizer: Any = None,
) -> Live:
    """Load both models and put the adapter on the base; of a base that is alive, on a copy.

    Args:
        base: The model before.
        tuned: The model after.
        adapter: Its folder.
        file: The same, opened.
        device: Where models are loaded to.
        tokenizer: By default what lies beside the tuned model, or the base.

    Raises:
        AdapterError: PEFT cannot load the adapter.
        CheckpointError: A model cannot be loaded, or is none that says next tokens.
        MismatchError: They are of two classes, or know other tokens.
    """
    check_sides(base, tuned)
    after = load_side(tuned, device)
    before = load_side(base, device)
    if isinstance(base, nn.Module):
        before = copy.deepcopy(before)
    if (rows := rows_brought(file, (label(base), before), (label(tuned), after))) is not None:
        before.resize_token_embeddings(rows, mean_resizing=False)
    with torch.random.fork_rng():  # PEFT draws what it then replaces.
        adapted = with_adapter(before, adapter)
    return Live(adapted, after, tokenizer_beside(tokenizer, tuned, base))


def rows_brought(file: AdapterFile, base: tuple[str, Any], tuned: tuple[str, Any], *, whole: bool = True) -> int | None:
    """The tokens that the base will know with an adapter that brings rows for more; None where it knows as many.

    Args:
        file: The adapter's.
        base: What messages call it, and the model.
        tuned: The same.
        whole: Whether the base will be in memory as a whole, and can be given rows.

    Raises:
        MismatchError: The models know other tokens, and the adapter brings none, or they cannot be given.
    """
    (name, before), (other, after) = base, tuned
    own, wanted = rows_of(before), rows_of(after)
    if own == wanted:
        return None
    if not any(file.headers[name].shape[:1] == (wanted,) for name in file.whole):
        raise MismatchError(
            f"`{name}` knows {own} tokens, `{other}` {wanted}, and the adapter brings no rows for them."
        )
    if not whole:
        raise MismatchError(
            f"The adapter brings rows for the {wanted} tokens of `{other}`. `distil` refines it, with both models in "
            "memory."
        )
    return wanted


def tokenizer_beside(tokenizer: Any, *sides: Side) -> Any:
    """The tokenizer that was given, or the first beside a model; None if there is none."""
    own = (tokenizer_of(side) for side in sides if not isinstance(side, nn.Module))
    return next((one for one in (tokenizer, *own) if one is not None), None)


Load: TypeAlias = Callable[[Checkpoint, Any, torch.device], Any]
"""From a checkpoint and its class to a model on a device."""


def load_side(side: Side, device: torch.device, load: Load = load_model) -> Any:
    """A causal language model, loaded if it is not alive yet.

    Args:
        side: The model.
        device: Where it is loaded to.
        load: How.

    Raises:
        CheckpointError: It cannot be loaded, or is none that says next tokens.
    """
    model: Any = side if isinstance(side, nn.Module) else load(side, _language_model(side), device)
    if not hasattr(model, "generate") or model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise CheckpointError(f"`{label(side)}` says no next tokens of a text; only causal language models do.")
    return model


def check_sides(base: Side, tuned: Side) -> None:
    """See, from configurations alone, whether both are language models of one class.

    Raises:
        CheckpointError: One is none that can be loaded, or that says next tokens.
        MismatchError: They are of two classes.
    """
    for side in (base, tuned):
        if not isinstance(side, nn.Module):
            _language_model(side)
    check_classes(base, tuned)


def _language_model(side: Checkpoint) -> Any:
    """The class of a checkpoint that is a language model."""
    if not is_loadable(side):
        raise CheckpointError(
            f"`{side.label}` cannot be loaded: only a model in a folder or on the hub is, by its own names."
        )
    cls = class_of(_class_name(side))
    if cls is None or not hasattr(cls, "generate"):
        raise CheckpointError(f"`{side.label}` is no language model of transformers: it says no next tokens.")
    if (side.config or {}).get("is_encoder_decoder"):
        raise CheckpointError(f"`{side.label}` says no next tokens of a text; only causal language models do.")
    return cls


def label(side: Side) -> str:
    """What messages call a model."""
    if isinstance(side, Checkpoint):
        return side.label
    return loaded_from(side) or type(side).__name__


def check_classes(base: Side, tuned: Side) -> None:
    """See that two models have a class in common.

    Raises:
        MismatchError: They have not.
    """
    names = [_class_name(side) for side in (base, tuned)]
    if not names[0] or names[0] != names[1]:
        raise MismatchError(f"There is no common class of both models ({names[0] or None} and {names[1] or None}).")


def _class_name(side: Side) -> str:
    if isinstance(side, Checkpoint):
        return architecture(side.config or {})
    own: Any = side
    return type(own.get_base_model() if hasattr(own, "get_base_model") else own).__name__


def check_pair(adapted: Any, tuned: Any, names: Sequence[str] | None = None) -> None:
    """See that two live models say the same tokens.

    Args:
        adapted: The base, with an adapter on it.
        tuned: The model after.
        names: What messages call them.

    Raises:
        MismatchError: They are of two classes, or know other tokens.
    """
    check_classes(adapted, tuned)
    rows = [rows_of(model) for model in (adapted, tuned)]
    if rows[0] != rows[1]:
        called = names or [label(adapted), label(tuned)]
        raise MismatchError(f"`{called[0]}` knows {rows[0]} tokens, `{called[1]}` {rows[1]}.")


@torch.no_grad()
def check_finite(name: str, model: Any, vocabulary: int) -> None:
    """See that there is something to draw from.

    Raises:
        PosthocError: The model's outputs are no numbers.
    """
    ids = torch.arange(min(vocabulary, 8), device=model.device)[None]
    if not torch.isfinite(says(model)(Batch(ids, ones := torch.ones_like(ids), ones))).all():
        raise PosthocError(f"The {name} says what is no number: there is nothing to fit to.")


def says(model: Any, device: torch.device | None = None) -> Model:
    """A causal language model as a function of batches to logits.

    Args:
        model: Wherever it is.
        device: Where the logits go; its own if None.
    """

    def logits(batch: Batch) -> Tensor:
        own = model.device
        found: Tensor = model(input_ids=batch.ids.to(own), attention_mask=batch.mask.to(own), use_cache=False).logits
        return found if device is None else found.to(device)

    return logits
