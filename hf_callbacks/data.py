"""The text that a trainer has: its eval set's, or its train set's, as the token ids that its model reads."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from transformers import Trainer

from hf_callbacks.random_numbers import numbers_kept
from peft_posthoc.errors import PosthocError, one_line
from peft_posthoc.refinement.refining import Refining
from peft_posthoc.texts.texts import Given, of_data

logger = logging.getLogger(__name__)

LENGTH = 512
"""The most tokens of a text, by default."""


def on_data_of(trainer: Trainer | None, refining: Refining) -> Refining:
    """The same refinement, on texts of the trainer's data where none were given; on the models' own if it has none.

    Args:
        trainer: Its eval set is taken; its train set only where it has none.
        refining: How many texts and tokens at most, and the seed that texts are drawn by.
    """
    if refining.texts is not None:
        return refining
    try:
        if trainer is None:
            raise PosthocError("The trainer is not known.")
        with numbers_kept():  # A data set, and a collator, may draw.
            texts = [ids for ids in _texts(trainer, of_data(refining.sequences), refining.seed) if len(ids) > 1]
        if not texts:
            raise PosthocError("The trainer's data set is empty.")
    except Exception as error:  # They are the user's own code.
        reason = one_line(error).removesuffix(".")
        logger.warning("phlora: %s: the adapter is refined on text that the models write.", reason)
        return refining
    return replace(refining, texts=Given(texts), length=min(refining.length or LENGTH, max(map(len, texts))))


def _texts(trainer: Trainer, most: int, seed: int) -> Iterator[list[int]]:
    # Not by the trainer's own loaders: in several processes those wait for one another.
    given = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    sets = list(given.values()) if isinstance(given, Mapping) else [given]
    for one in sets:
        own, collate = one, trainer.data_collator
        if hasattr(one, "column_names") and hasattr(one, "remove_columns"):
            own = trainer._remove_unused_columns(one, description="refining")
        else:
            collate = trainer._get_collator_with_removed_columns(collate, description="refining")
        for row in _rows(own, -(-most // len(sets)), seed):
            yield from _ids(collate([row]))


def _rows(data: Any, most: int, seed: int) -> Iterator[Any]:
    """Some rows of a data set, from anywhere in it; the first of one that is only read in its order."""
    if data is None:
        return
    if not hasattr(data, "__len__") or isinstance(data, torch.utils.data.IterableDataset):
        yield from islice(iter(data), most)
        return
    for place in sorted(random.Random(seed).sample(range(len(data)), min(most, len(data)))):
        yield data[place]


def _ids(batch: Any) -> Iterable[list[int]]:
    """The texts of a batch, without padding; those that were put together in one row, each alone."""
    if not isinstance(batch, Mapping) or batch.get("input_ids") is None:
        raise PosthocError("The trainer's collator gives no `input_ids`.")
    rows = torch.as_tensor(batch["input_ids"])
    mask, places = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and torch.as_tensor(mask).shape == rows.shape:
        return [row[keep.bool()].tolist() for row, keep in zip(rows, torch.as_tensor(mask), strict=True)]
    if places is not None and torch.as_tensor(places).shape == rows.shape:
        return chain.from_iterable(map(_apart, rows, torch.as_tensor(places)))
    return [row.tolist() for row in rows]


def _apart(row: torch.Tensor, places: torch.Tensor) -> list[list[int]]:
    starts = [*(places == 0).nonzero().flatten().tolist(), len(row)]
    return [row[start:end].tolist() for start, end in zip([0, *starts], starts, strict=False) if end > start]
