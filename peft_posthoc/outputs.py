"""What models say: base + adapter against the tuned model, on prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from peft_posthoc.checkpoint import Checkpoint
from peft_posthoc.errors import CheckpointError
from peft_posthoc.factor import frobenius
from peft_posthoc.regular import check_folder

# Said to the models when the user gives nothing to say.
PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Question: What is the capital of France?\nAnswer:",
)


@dataclass(frozen=True)
class Outputs:
    """How far a model's outputs are from the tuned model's."""

    kl: float | None
    """KL(tuned || model) per token, in nats; None for a model without logits."""
    top1: float | None
    """Share of the tokens at which both would say the same next; None for a model without logits."""
    relative_error: float
    """Of the logits, or of the last hidden states."""


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
    """
    names = [(checkpoint.config or {}).get("architectures") or [None] for checkpoint in (base, tuned)]
    if base.folder is None or tuned.folder is None:
        return None, None, "only checkpoints in folders or on the hub are loaded as models"
    if names[0][0] is None or names[0][0] != names[1][0]:
        return None, None, f"the configurations name no common model class ({names[0][0]} and {names[1][0]})"
    for folder in (base.folder, tuned.folder, adapter):
        check_folder(folder)
    import peft
    import transformers

    if not hasattr(transformers, names[0][0]):
        return None, None, f"transformers knows no class {names[0][0]}"
    inputs, note = _inputs(base, tuned, prompts, token_ids)
    with tqdm(total=3, desc="Outputs", disable=not progress) as bar:
        model = _load(tuned.folder, names[0][0], device)
        rows, wanted = _rows(model), _say(model, inputs)
        bar.update()
        model = _load(base.folder, names[0][0], device)
        if _rows(model) != rows and extended:
            model.resize_token_embeddings(rows, mean_resizing=False)
        if _rows(model) != rows:
            return None, None, f"the vocabularies differ ({_rows(model)} and {rows} rows)"
        alone = _distance(_say(model, inputs), wanted, has_logits=_has_logits(model))
        bar.update()
        adapted = _distance(
            _say(peft.PeftModel.from_pretrained(model, str(adapter)), inputs), wanted, has_logits=_has_logits(model)
        )
        bar.update()
    return adapted, alone, note


def _rows(model: Any) -> int | None:
    """Of the token embeddings."""
    try:
        return len(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError):  # It reads no tokens.
        return None


def _load(folder: Path, class_name: str, device: torch.device) -> Any:
    import transformers

    model = getattr(transformers, class_name).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.to(device).eval()


def _inputs(
    base: Checkpoint, tuned: Checkpoint, prompts: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> tuple[list[Tensor], str]:
    if token_ids:
        return [torch.tensor([list(ids)]) for ids in token_ids], f"on {len(token_ids)} given sequences of token ids"
    texts = list(prompts) or list(PROMPTS)
    tokenizer = _tokenizer(tuned) or _tokenizer(base)
    if tokenizer is not None:
        encoded = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
        return [ids for ids in encoded if ids.numel()], f"on {len(texts)} {'given' if prompts else 'built-in'} prompts"
    if prompts:
        raise CheckpointError(f"No tokenizer beside `{tuned.label}` or `{base.label}` for the prompts. Give token ids.")
    config = base.config or {}
    vocabulary = int(config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 0)
    if not vocabulary:
        raise CheckpointError(f"The configuration of `{base.label}` gives no vocabulary size. Give token ids.")
    random = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (8, 32), generator=random)], "on 8 sequences of 32 random tokens"


def _tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")
    if checkpoint.folder is None:
        return None
    if any((checkpoint.folder / file).is_file() for file in files):
        return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
    if checkpoint.revision is not None:
        return AutoTokenizer.from_pretrained(checkpoint.label, revision=checkpoint.revision)
    return None


def _has_logits(model: Any) -> bool:
    return model.get_output_embeddings() is not None


@torch.no_grad()
def _say(model: Any, inputs: Sequence[Tensor]) -> Tensor:
    """Logits, or last hidden states, of all tokens: tokens x values."""
    device = next(model.parameters()).device
    said = []
    for ids in inputs:
        extra = {"decoder_input_ids": ids.to(device)} if model.config.is_encoder_decoder else {}
        output = model(input_ids=ids.to(device), **extra)
        values = output.logits if hasattr(output, "logits") else output.last_hidden_state
        said.append(values.reshape(-1, values.shape[-1]).float().cpu())
    return torch.cat(said)


def _distance(said: Tensor, wanted: Tensor, *, has_logits: bool) -> Outputs:
    relative_error = frobenius(said - wanted) / frobenius(wanted)
    if not has_logits:
        return Outputs(None, None, relative_error)
    log_wanted, log_said = (torch.log_softmax(values.double(), dim=-1) for values in (wanted, said))
    kl = float((log_wanted.exp() * (log_wanted - log_said)).sum(-1).mean())
    top1 = float((said.argmax(-1) == wanted.argmax(-1)).double().mean())
    return Outputs(max(kl, 0.0), top1, relative_error)
