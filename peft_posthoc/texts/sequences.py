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
    prompt: int = 0
    """How many tokens its prompt has, where it is an answer to one."""


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
    prompts_held_out: bool = True
    """Whether no answer to a prompt is fitted on where another one judges; of a few prompts none can be spared."""


def places_of(config: Any) -> int | None:
    """Tokens of the longest text that a language model can read; None where its configuration does not say.

    Args:
        config: transformers', of the whole model.
    """
    own = config.get_text_config()
    return getattr(own, "max_position_embeddings", None) or getattr(own, "max_seq_len", None)


def held_out_of(count: int) -> int:
    """How many of so many different prompts, or texts without one, are held out: a tenth, and at least one."""
    return max(1, round(0.1 * count)) if count > 1 else 0


def spares(prompts: int) -> bool:
    """Whether of so many different prompts a tenth is one or more, so that some can be held out with all answers."""
    return prompts >= 10


def split(texts: Sequence[Tokens]) -> Split:
    """Hold out every tenth prompt of each kind with all its answers, and of texts without one every tenth text.

    At least one is held out. Of fewer than ten prompts every tenth answer is: another to its prompt may be fitted on,
    but never the same text.

    Args:
        texts: In any order; a text may stand there more than once.
    """
    prompts = {kind: {text.ids[: text.prompt] for text in texts if text.kind == kind and text.prompt} for kind in KINDS}

    def judged_as(text: Tokens) -> tuple[int, ...]:
        return text.ids[: text.prompt] if text.prompt and spares(len(prompts[text.kind])) else text.ids

    judges = set[tuple[Kind, tuple[int, ...]]]()
    for kind in KINDS:
        own = list(dict.fromkeys(judged_as(text) for text in texts if text.kind == kind))
        count = held_out_of(len(own))
        judges |= {(kind, own[i * len(own) // count]) for i in range(count)}
    sides: tuple[list[Tokens], list[Tokens]] = [], []
    for text in texts:
        sides[(text.kind, judged_as(text)) in judges].append(text)
    once = {(text.kind, text.ids): text for text in sides[True]}
    held_out = sorted(once.values(), key=lambda text: KINDS.index(text.kind))
    fitted, judging = ({(text.kind, text.ids[: text.prompt]) for text in own if text.prompt} for own in sides)
    return Split(sides[False], held_out, prompts_held_out=not fitted & judging)


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
