"""Text that a model writes: token ids drawn from it, several starts at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def write_on(
    model: Any,
    starts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    *,
    ends: Sequence[int],
    size: int = 32,
    progress: Any = None,
) -> list[list[int]]:
    """Let a model go on from each start, drawn from its own distribution as it is.

    What a checkpoint says of sampling (temperature, top-k) is not used. The draws are PyTorch's: seed them outside.

    Args:
        model: A causal language model of transformers.
        starts: Token ids to go on from, at least one each.
        tokens: How many each may add.
        ends: Tokens that end a text; they are not part of the answer.
        size: How many are written at a time.
        progress: A bar to move on by each text.

    Returns:
        What was added to each.
    """
    from transformers import GenerationConfig

    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(model.parameters()).device
    order = sorted(range(len(starts)), key=lambda i: (len(starts[i]), tokens[i]))
    added: list[list[int]] = [[] for _ in starts]
    for first in range(0, len(order), size):
        part = order[first : first + size]
        longest = max(len(starts[i]) for i in part)
        ids = torch.zeros(len(part), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(part):
            ids[row, longest - len(starts[i]) :] = torch.tensor(list(starts[i]))
            mask[row, longest - len(starts[i]) :] = 1
        config = GenerationConfig(
            do_sample=True,
            top_k=0,  # PyTorch draws from all tokens; 50 is transformers' default.
            max_new_tokens=max(tokens[i] for i in part),
            eos_token_id=list(ends) or None,
            pad_token_id=0,
        )
        with torch.no_grad(), _without_settings(model):
            written = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
        for row, i in enumerate(part):
            new = written[row, longest:].tolist()[: tokens[i]]
            end = next((k for k, token in enumerate(new) if token in ends), len(new))
            added[i] = new[:end]
            if progress is not None:
                progress.update()
    return added


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """The model without what its checkpoint says of generation: transformers fills in whatever a call leaves open."""
    from transformers import GenerationConfig

    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
