"""Token sequences that an adapter is fitted on, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["task", "general"]
KINDS: tuple[Kind, ...] = ("task", "general")


class Tokens(NamedTuple):
    """One text, as token ids."""

    ids: tuple[int, ...]
    kind: Kind
    """Whether it looks like the task's, or is there to keep everything else as it is."""
    fixed: tuple[int, ...] = ()
    """Places of tokens that stand in every text, as a chat template's do: no model ever has to say them."""


class Batch(NamedTuple):
    """Several texts, padded on the right to the longest."""

    ids: Tensor
    """`texts x tokens`, int64."""
    mask: Tensor
    """1 where there is a token, 0 where there is padding."""
    counted: Tensor
    """1 where what comes next counts, 0 before a fixed token and where there is padding."""


class Split(NamedTuple):
    """Texts to fit on, and texts to judge by."""

    fitted: list[Tokens]
    held_out: list[Tokens]
    guessed: bool = False
    """Whether nothing was said of the task: the models wrote the prompts, and what they wrote may be another."""


def places_of(config: Any) -> int | None:
    """Tokens of the longest text that a language model can read; None where its configuration does not say.

    Args:
        config: transformers', of the whole model.
    """
    own = config.get_text_config()
    return getattr(own, "max_position_embeddings", None) or getattr(own, "max_seq_len", None)


def held_out_of(count: int) -> int:
    """How many of so many different texts of a kind are held out: a tenth, and at least one."""
    return max(1, round(0.1 * count)) if count > 1 else 0


def split(texts: Sequence[Tokens]) -> Split:
    """Hold out every tenth text of each kind, and at least one; the same text is never on both sides.

    Args:
        texts: In any order; a text may stand there more than once.
    """
    held_out: list[Tokens] = []
    for kind in KINDS:
        own = list({text.ids: text for text in texts if text.kind == kind}.values())
        count = held_out_of(len(own))
        held_out += [own[i * len(own) // count] for i in range(count)]
    judges = {(text.ids, text.kind) for text in held_out}
    return Split([text for text in texts if (text.ids, text.kind) not in judges], held_out)


def batches(texts: Iterable[Tokens], size: int, *, device: torch.device) -> Iterator[Batch]:
    """The texts, `size` at a time, in their order."""
    texts = list(texts)
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        longest = max(len(text.ids) for text in part)
        ids = torch.zeros(len(part), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(part):
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
            mask[row, : len(text.ids)] = 1
        counted = mask.clone()
        for row, text in enumerate(part):
            counted[row, [place - 1 for place in text.fixed if place > 0]] = 0
        yield Batch(ids.to(device), mask.to(device), counted.to(device))


def shuffled(texts: Sequence[Tokens], size: int, seed: int) -> Iterator[list[Tokens]]:
    """The texts over and over, `size` at a time, each round in an order of its own.

    Texts of similar length are put together, so that little is padded.
    """
    order = random.Random(seed)
    while True:
        # The order within one length is random, and so is the order of the batches.
        by_length = sorted(texts, key=lambda text: (len(text.ids) // 16, order.random()))
        parts = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        order.shuffle(parts)
        yield from parts
