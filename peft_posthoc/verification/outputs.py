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

from peft_posthoc.adapters.config import read_config, try_patterns
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import AdapterError, CheckpointError, PosthocError
from peft_posthoc.files import check_folder
from peft_posthoc.json_file import read_json
from peft_posthoc.linalg.norms import frobenius
from peft_posthoc.models.by_class import check_counts, class_of
from peft_posthoc.models.remote_code import comes_with_code, not_run, without_code
from peft_posthoc.text import asked

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
    cls = class_of(str(names[0][0]))
    if cls is None:
        return None, None, f"transformers has no class {names[0][0]}{not_run(tuned.config or base.config or {})}"
    for folder in (base.folder, tuned.folder, adapter):
        check_folder(folder)

    inputs, note = _inputs(base, tuned, prompts, token_ids)
    with tqdm(total=3, desc="Outputs", disable=not progress) as bar:
        model = _loaded(tuned.folder, cls, device, tuned)
        rows, wanted = _rows(model), _say(model, inputs)
        bar.update()
        model = _loaded(base.folder, cls, device, base)
        if _rows(model) != rows and extended:
            model.resize_token_embeddings(rows, mean_resizing=False)
        if _rows(model) != rows:
            return None, None, f"the vocabularies differ ({_rows(model)} and {rows} rows)"
        alone = _distance(_say(model, inputs), wanted, has_logits=_has_logits(model))
        bar.update()
        adapted = _distance(_say(_with_adapter(model, adapter), inputs), wanted, has_logits=_has_logits(model))
        bar.update()
    return adapted, alone, note


def _rows(model: Any) -> int | None:
    """Of the token embeddings."""
    try:
        return len(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError):  # It reads no tokens.
        return None


def _loaded(folder: Path, cls: Any, device: torch.device, checkpoint: Checkpoint) -> Any:
    """The model of a checkpoint in a folder.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    check_counts(checkpoint.config or {})
    try:
        return _load(folder, cls, device)
    except PosthocError:
        raise
    except Exception as error:
        # Each class fails in its own way on a configuration that it does not expect.
        raise CheckpointError(
            f"transformers cannot load `{checkpoint.label}`: {type(error).__name__}: {error} With "
            f"`{asked('outputs', False)}` only weights are compared."
        ) from error


def _with_adapter(model: Any, adapter: str | PathLike[str]) -> Any:
    """The model with an adapter on it, as PEFT loads it.

    Raises:
        AdapterError: PEFT cannot, or would be held up without end by a pattern.
    """
    import peft

    try_patterns(read_config(Path(adapter)), [name for name, _ in model.named_modules()], adapter)
    try:
        return peft.PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:
        raise AdapterError(f"PEFT cannot load `{adapter}`: {type(error).__name__}: {error}") from error


def _load(folder: Path, cls: Any, device: torch.device) -> Any:
    config = cls.config_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Models within the model are made from its configuration, and ask about the code that it names.
    config = cls.config_class.from_dict(without_code(config.to_dict()))
    model = cls.from_pretrained(
        folder, config=config, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
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
    coded = [checkpoint.label for checkpoint in (tuned, base) if _names_code(checkpoint)]
    why = f": the tokenizer of `{coded[0]}` is code that comes with it, which is not run" if coded else ""
    if prompts and not coded:
        raise CheckpointError(f"No tokenizer beside `{tuned.label}` or `{base.label}` for the prompts. Give token ids.")
    if prompts:
        raise CheckpointError(f"There is no tokenizer for the prompts{why}. Give token ids.")
    config = base.config or {}
    vocabulary = int(config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 0)
    if not vocabulary:
        raise CheckpointError(f"The configuration of `{base.label}` gives no vocabulary size. Give token ids.")
    random = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (8, 32), generator=random)], f"on 8 sequences of 32 random tokens{why}"


def _tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")
    if checkpoint.folder is None:
        return None
    try:
        if any((checkpoint.folder / file).is_file() for file in files):
            return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        if checkpoint.revision is not None:
            return AutoTokenizer.from_pretrained(
                checkpoint.label, revision=checkpoint.revision, trust_remote_code=False
            )
    except Exception:  # Without its code, a tokenizer's files fail in ways of their own.
        if not _names_code(checkpoint):
            raise
    return None


def _names_code(checkpoint: Checkpoint) -> bool:
    """Whether the tokenizer is, or may be, code in the folder."""
    folder, config = checkpoint.folder, checkpoint.config or {}
    try:
        own = read_json(folder / "tokenizer_config.json") if folder else {}
    except ValueError:
        own = {}
    of_model = config.get("auto_map")
    return (isinstance(own, dict) and comes_with_code(own)) or (
        isinstance(of_model, dict) and "AutoTokenizer" in of_model
    )


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
