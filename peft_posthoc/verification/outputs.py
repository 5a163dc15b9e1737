"""Outputs of models: base + adapter against the tuned model, on prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import CheckpointError
from peft_posthoc.linalg.norms import frobenius
from peft_posthoc.models.by_class import class_of
from peft_posthoc.models.remote_code import not_run
from peft_posthoc.progress import progress_bar
from peft_posthoc.running.inputs import inputs_for
from peft_posthoc.running.live import load_live
from peft_posthoc.running.load import is_loadable, load_model, rows_of, with_adapter
from peft_posthoc.texts.distance import Score, Sum
from peft_posthoc.texts.texts import Texts, usual_length
from peft_posthoc.texts.writers import Writers

_SIZE = 8
"""Texts in a batch."""


@dataclass(frozen=True)
class Outputs:
    """How far a model's outputs are from the tuned model's."""

    kl: float | None
    """KL(tuned || model) per token, in nats; None for a model without logits."""
    top1: float | None
    """Share of the tokens at which both would say the same next; None for a model without logits."""
    relative_error: float | None
    """Relative error of the logits, or of the last hidden states; None on texts, where `kl` and `top1` are told."""

    @property
    def distance(self) -> float:
        """KL, or the relative error where there is none."""
        return (self.relative_error or 0.0) if self.kl is None else self.kl


def compare_outputs(
    base: Checkpoint,
    tuned: Checkpoint,
    adapter: str | PathLike[str],
    prompts: Sequence[str],
    token_ids: Sequence[Sequence[int]],
    device: torch.device,
    *,
    extended: bool,
    progress: bool,
) -> tuple[Outputs | None, Outputs | None, str]:
    """Let the three models say something: tuned, base, and base + adapter.

    Returns:
        How far base + adapter is from tuned, and how far base alone; None where they were not compared. And on what
        they were, or why not.

    Raises:
        AdapterError: PEFT cannot load the adapter.
        CheckpointError: A model or the tokenizer cannot be loaded, or the model takes no tokens.
        ValueError: The token ids make no sense.
    """
    names = [(checkpoint.config or {}).get("architectures") or [None] for checkpoint in (base, tuned)]
    if not (is_loadable(base) and is_loadable(tuned)):
        return None, None, "only checkpoints in folders or on the hub are loaded as models"
    if names[0][0] is None or names[0][0] != names[1][0]:
        return None, None, f"the configurations name no common model class ({names[0][0]} and {names[1][0]})"
    cls = class_of(str(names[0][0]))
    if cls is None:
        return None, None, f"transformers has no class {names[0][0]}{not_run(tuned.config or base.config or {})}"
    with progress_bar(total=3, desc="Outputs", progress=progress) as bar:
        model = load_model(tuned, cls, device, drawn=(of_tuned := list[str]()))
        rows = rows_of(model)
        first = getattr(model, "main_input_name", "input_ids")
        if rows is None or first != "input_ids":
            return None, None, f"the model reads no tokens{'' if first == 'input_ids' else f' but `{first}`'}"
        inputs, note = inputs_for(base, tuned, prompts, token_ids)
        if outside := [token for ids in inputs for token in ids.flatten().tolist() if not 0 <= token < rows]:
            raise ValueError(f"Token id {outside[0]} is not in the vocabulary of `{tuned.label}`, 0 to {rows - 1}.")
        wanted = _say(model, inputs)
        bar.update()
        model = load_model(base, cls, device, drawn=(of_base := list[str]()))
        if rows_of(model) != rows and extended:
            model.resize_token_embeddings(rows, mean_resizing=False)
        if rows_of(model) != rows:
            return None, None, f"the vocabularies differ ({rows_of(model)} and {rows} rows)"
        has_logits = model.get_output_embeddings() is not None
        alone = _distance(_say(model, inputs), wanted, has_logits=has_logits)
        bar.update()
        adapted = _distance(_say(with_adapter(model, adapter), inputs), wanted, has_logits=has_logits)
        bar.update()
    for checkpoint, drawn in ((tuned, of_tuned), (base, of_base)):
        if drawn:
            note = f"{note}; `{checkpoint.label}` lacks {', '.join(drawn[:5])}, which transformers drew"
    return adapted, alone, note


def compare_on_texts(
    base: Checkpoint,
    tuned: Checkpoint,
    file: AdapterFile,
    texts: Texts,
    device: torch.device,
    *,
    sequences: int,
    length: int | None,
    progress: bool,
) -> tuple[Score, Score]:
    """Let base + adapter and the base read texts, of which the tuned model and the base may have written parts.

    Returns:
        How far base + adapter is from tuned on text of each kind, and how far base alone.

    Raises:
        AdapterError: PEFT cannot load the adapter.
        CheckpointError: A model cannot be loaded, or is no causal language model.
        PosthocError: There is no text.
    """
    live = load_live(base, tuned, file.place, file, device=device)
    with live.adapted.disable_adapter():
        writers = Writers(live.adapted, live.tuned, live.tokenizer, live.vocabulary)
        most = length or usual_length(texts, writers)
        most = min(most, live.longest or most)
        written = texts.write(writers, count=sequences, length=most, seed=0, progress=progress)
        alone = live.distances(written, size=_SIZE)
    return live.distances(written, size=_SIZE), alone


def of_task(score: Score) -> Outputs:
    """The distance on text like the task's."""
    return Outputs(score["task"].kl, score["task"].top1, None)


@torch.no_grad()
def _say(model: Any, inputs: Sequence[Tensor]) -> Tensor:
    """Logits, or last hidden states, of all tokens: tokens x values."""
    device = next(model.parameters()).device
    said = []
    for ids in inputs:
        extra = {"decoder_input_ids": ids.to(device)} if model.config.is_encoder_decoder else {}
        try:
            output = model(input_ids=ids.to(device), **extra)
        except Exception as error:  # Each class fails in its own way on what it does not expect.
            raise CheckpointError(
                f"{type(model).__name__} cannot be run on {ids.numel()} tokens alone: {type(error).__name__}: {error}"
            ) from error
        values = output.logits if hasattr(output, "logits") else output.last_hidden_state
        said.append(values.reshape(-1, values.shape[-1]).float().cpu())
    return torch.cat(said)


def _distance(said: Tensor, wanted: Tensor, *, has_logits: bool) -> Outputs:
    relative_error = frobenius(said - wanted) / frobenius(wanted)
    if not has_logits:
        return Outputs(None, None, relative_error)
    total = Sum()
    total.add(said.double(), wanted.double(), torch.ones(len(said)))
    found = total.distance()
    return Outputs(found.kl, found.top1, relative_error)
