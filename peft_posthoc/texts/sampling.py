"""Text that a model writes: token ids drawn from it, several starts at a time."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from peft_posthoc.compute.together import ALONE, Together
from peft_posthoc.errors import PosthocError
from peft_posthoc.texts.sequences import places_of


class _Row(NamedTuple):
    """A text on its way."""

    place: int
    start: list[int]
    added: list[int]
    most: int
    """Tokens that may be added."""
    done: bool = False


def write_on(
    model: Any,
    starts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    *,
    ends: Sequence[int],
    never: Sequence[int] = (),
    size: int = 32,
    temperature: float = 1.0,
    until: float = math.inf,
    together: Together = ALONE,
    progress: Any = None,
) -> list[list[int] | None]:
    """Let a model go on from each start, drawn from its own distribution.

    What a checkpoint says of sampling (temperature, top-k) is not used. The draws are PyTorch's: seed them outside.

    Args:
        model: A causal language model of transformers.
        starts: Token ids to go on from, at least one each.
        tokens: How many each may add. Together with its start that is no more than the model can read.
        ends: Tokens that end a text.
        never: Tokens that are not drawn; with those of `ends` among them each text is as long as it may be.
        size: How many are written at a time.
        temperature: Of that distribution; 1 is as it is.
        until: When to stop, as `time.monotonic()` tells.
        together: Processes that share the texts out; the texts are those of one process.
        progress: A bar to move on by each text.

    Returns:
        What was added to each, the end that it came to included; None where there was no time to begin.
    """
    if hasattr(model, "get_base_model"):
        with torch.random.fork_rng():  # Some draw as they are loaded.
            model = model.get_base_model()
    seed = int(torch.randint(1 << 62, ()))
    added: list[list[int] | None] = [None] * len(starts)
    rows = [_Row(i, list(start), [], tokens[i]) for i, start in enumerate(starts)]
    while rows:
        rows.sort(key=lambda row: (len(row.start), row.most))
        parts = list(enumerate(rows[first : first + size] for first in range(0, len(rows), size)))
        # Should the time be up, there are some of each length.
        random.Random(0).shuffle(parts)
        written: list[_Row] = []
        with together.agreed(), torch.random.fork_rng(), _without_settings(model):
            for at, part in together.share(parts):
                if time.monotonic() >= until:
                    break
                torch.manual_seed(seed + at)
                written += _written(model, part, ends, never, temperature, until)
                if progress is not None:
                    progress.update(sum(row.done for row in written[-len(part) :]))
        rows, seed = [], seed + len(parts)
        for row in together.gather(written):
            added[row.place] = row.added
            rows += [] if row.done else [row]
    return added


@torch.no_grad()
def _written(
    model: Any, rows: Sequence[_Row], ends: Sequence[int], never: Sequence[int], temperature: float, until: float
) -> list[_Row]:
    """A batch of texts, gone on with as far as it goes."""
    from transformers import GenerationConfig

    longest = max(len(row.start) for row in rows)
    most = max(row.most for row in rows)
    # What is padded takes places too; who has room left goes on in another batch.
    if places := places_of(model.config):
        most = max(1, min(most, places - longest))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row.start) :] = torch.tensor(row.start)
        mask[i, longest - len(row.start) :] = 1
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,  # PyTorch draws from all tokens; 50 is transformers' default.
        max_new_tokens=most,
        max_time=None if math.isinf(until) else max(until - time.monotonic(), 0.0),
        eos_token_id=list(ends) or None,
        suppress_tokens=list(never) or None,
        pad_token_id=0,
    )
    device = next(model.parameters()).device

    def numbers(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if not (logits < math.inf).all():  # What is no number is not less.
            name = getattr(model.config, "_name_or_path", None) or type(model).__name__
            raise PosthocError(
                f"`{name}` says what is no number on text that it writes: there is nothing to draw from."
            )
        return logits

    found = model.generate(
        ids.to(device), attention_mask=mask.to(device), generation_config=config, logits_processor=[numbers]
    )[:, longest:]
    late = time.monotonic() >= until
    return [_with(row, new[: row.most], ends, late=late) for row, new in zip(rows, found.tolist(), strict=True)]


def _with(row: _Row, new: list[int], ends: Sequence[int], *, late: bool) -> _Row:
    end = next((i for i, token in enumerate(new) if token in ends), None)
    if end is not None:
        return row._replace(added=[*row.added, *new[: end + 1]], done=True)
    left = row.most - len(new)
    return _Row(row.place, [*row.start, *new], [*row.added, *new], left, late or left == 0)


def without_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """A text without the token that ended it."""
    return list(ids[:-1] if ids and ids[-1] in ends else ids)


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """The model without what its checkpoint says of generation: transformers fills in whatever a call leaves open."""
    from transformers import GenerationConfig

    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
