"""Token ids for a model to read: given ones, texts by its tokenizer, or random ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, place_of
from peft_posthoc.checkpoints.view import as_handed
from peft_posthoc.errors import CheckpointError
from peft_posthoc.files import check_folder
from peft_posthoc.json_file import read_json
from peft_posthoc.models.from_gguf import OfGguf
from peft_posthoc.models.remote_code import comes_with_code
from peft_posthoc.text import asked

# Read by the models when the user gives nothing to read.
PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Question: What is the capital of France?\nAnswer:",
)
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


def inputs_for(
    base: Checkpoint, tuned: Checkpoint, prompts: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> tuple[list[Tensor], str]:
    """Sequences that two states of a model read, one row each, and what they are in words.

    Args:
        base: A model.
        tuned: The model whose tokenizer comes first.
        prompts: Texts.
        token_ids: The same, already tokenized.

    Raises:
        CheckpointError: There is no tokenizer for the prompts, it cannot be read, or it makes no token of one.
        ValueError: A sequence of token ids is empty, or one is larger than any.
    """
    if token_ids:
        if not all(map(len, token_ids)):
            raise ValueError(f"`{asked('token_ids', None)}` needs at least one token id in every sequence.")
        largest = torch.iinfo(torch.int64).max
        if beyond := [token for ids in token_ids for token in ids if abs(token) > largest]:
            raise ValueError(f"Token id {beyond[0]} is in no vocabulary.")
        return [torch.tensor([list(ids)]) for ids in token_ids], f"on {len(token_ids)} given sequences of token ids"
    texts = list(prompts) or list(PROMPTS)
    tokenizer = tokenizer_of(tuned) or tokenizer_of(base)
    if tokenizer is not None:
        encoded = [tokenizer(text, return_tensors="pt")["input_ids"].long() for text in texts]
        for text, ids in zip(texts, encoded, strict=True):
            if not ids.numel():
                raise CheckpointError(f"The tokenizer of `{tuned.label}` makes no token of the prompt {text!r}.")
        return encoded, f"on {len(texts)} {'given' if prompts else 'built-in'} prompts"
    coded = [checkpoint.label for checkpoint in (tuned, base) if _names_code(checkpoint)]
    why = f": the tokenizer of `{coded[0]}` is code that comes with it, which is not run" if coded else ""
    if prompts:
        where = "" if coded else f" beside `{tuned.label}` or `{base.label}`"
        raise CheckpointError(f"There is no tokenizer{where} for the prompts{why}. Give `{asked('token_ids', None)}`.")
    config = base.config or {}
    vocabulary = int(config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 0)
    if not vocabulary:
        raise CheckpointError(
            f"The configuration of `{base.label}` gives no vocabulary size. Give `{asked('token_ids', None)}`."
        )
    random = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (8, 32), generator=random)], f"on 8 sequences of 32 random tokens{why}"


def identity_of(tokenizer: Any) -> str | None:
    """A digest of what a tokenizer makes of texts and conversations; None where it does not tell.

    Args:
        tokenizer: transformers', or None.
    """
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        encodes = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
        told = [type(tokenizer).__name__, encodes, tokenizer.chat_template, str(tokenizer.special_tokens_map)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint; None if it has none, or only one that is code.

    Raises:
        CheckpointError: It cannot be read.
    """
    from transformers import AutoTokenizer

    found = as_handed(checkpoint)
    if isinstance(found, OfGguf):
        return _of_gguf(found)
    folder = place_of(checkpoint)
    if folder is None:
        return None
    check_folder(folder)
    here = any((folder / file).is_file() for file in _FILES)
    if not here and checkpoint.revision is None:
        return None
    place = {"local_files_only": True} if here else {"revision": checkpoint.revision}
    try:
        return AutoTokenizer.from_pretrained(folder if here else checkpoint.label, trust_remote_code=False, **place)
    except Exception as error:  # Without its code, a tokenizer's files fail in ways of their own.
        if _names_code(checkpoint):
            return None
        raise CheckpointError(
            f"The tokenizer of `{checkpoint.label}` cannot be read: {type(error).__name__}: {error}."
        ) from error


def _of_gguf(model: OfGguf) -> Any:
    """The tokenizer that a GGUF file describes; None if it describes none."""
    from transformers import AutoTokenizer

    file = model.seen.files[0]
    if "tokenizer.ggml.model" not in model.seen.metadata:
        return None
    try:
        return AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # Of what it does not expect transformers makes errors of every kind.
        raise CheckpointError(
            f"transformers makes no tokenizer of `{model.label}`: {type(error).__name__}: {error}."
        ) from error


def _names_code(checkpoint: Checkpoint) -> bool:
    """Whether the tokenizer is, or may be, code in the folder."""
    folder, config = place_of(checkpoint), checkpoint.config or {}
    try:
        own = read_json(folder / "tokenizer_config.json") if folder else {}
    except ValueError:
        own = {}
    of_model = config.get("auto_map")
    return (isinstance(own, dict) and comes_with_code(own)) or (
        isinstance(of_model, dict) and "AutoTokenizer" in of_model
    )
