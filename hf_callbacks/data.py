"""The text that a trainer has: its eval set's, or its train set's, as the token ids that its model reads."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import Trainer
from transformers.utils import is_datasets_available

from hf_callbacks.random_numbers import numbers_kept
from peft_posthoc.errors import PosthocError, one_line
from peft_posthoc.refinement.refining import Refining
from peft_posthoc.text import counted
from peft_posthoc.texts.texts import MOST, Given, of_data

logger = logging.getLogger(__name__)

_UNLEARNT = -100
"""The label of a token that no loss is taken of."""


class _Row(NamedTuple):
    """One text of the trainer's."""

    ids: list[int]
    learnt: int
    """The place of the first token that is learnt: where its answer begins."""


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
            rows = [row for row in _texts(trainer, of_data(refining.sequences), refining.seed) if len(row.ids) > 1]
        if not rows:
            raise PosthocError("The trainer's data set is empty.")
        length = min(refining.length or MOST, max(len(row.ids) for row in rows))
        texts = [row.ids[:length] for row in rows if row.learnt < length]
        if not texts:
            raise PosthocError(f"No answer of the trainer's data begins within {length} tokens.")
    except Exception as error:  # They are the user's own code.
        reason = one_line(error).removesuffix(".")
        logger.warning("phlora: %s: the adapter is refined on text that the models write.", reason)
        return refining
    cut, late = sum(len(row.ids) > length > row.learnt for row in rows), len(rows) - len(texts)
    if cut or late:
        logger.warning(
            "phlora: to refine the adapter, of %s %d are cut to %d tokens, and %d are left out, whose answers begin "
            "later. `refine={'length': ...}` has room for more.",
            counted(len(rows), "row", "rows"),
            cut,
            length,
            late,
        )
    return replace(refining, texts=Given(texts), length=length)


def _texts(trainer: Trainer, most: int, seed: int) -> Iterator[_Row]:
    # Not by the trainer's own loaders: in several processes those wait for one another.
    given = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    sets = list(given.values()) if isinstance(given, Mapping) else [given]
    for one in sets:
        own, collate = one, trainer.data_collator
        if _is_table(one):
            own = trainer._remove_unused_columns(one, description="refining")
        else:
            collate = trainer._get_collator_with_removed_columns(collate, description="refining")
        for row in _rows(own, -(-most // len(sets)), seed):
            yield from _of_batch(collate([row]))


def _is_table(data: Any) -> bool:
    """Whether the trainer takes columns out of the data set itself, and not out of each row."""
    if not is_datasets_available():
        return False
    import datasets

    return isinstance(data, datasets.Dataset)


def _rows(data: Any, most: int, seed: int) -> Iterator[Any]:
    """Some rows of a data set, from anywhere in it; the first of one that is only read in its order."""
    if data is None:
        return
    if not hasattr(data, "__len__") or isinstance(data, torch.utils.data.IterableDataset):
        yield from itertools.islice(iter(data), most)
        return
    for place in sorted(random.Random(seed).sample(range(len(data)), min(most, len(data)))):
        yield data[place]


def _of_batch(batch: Any) -> Iterator[_Row]:
    """The texts of a batch, without padding; those that were put together in one row, each alone."""
    if not isinstance(batch, Mapping) or batch.get("input_ids") is None:
        raise PosthocError("The trainer's collator gives no `input_ids`.")
    rows = torch.as_tensor(batch["input_ids"])
    mask, places, labels = (_alike(batch.get(name), rows) for name in ("attention_mask", "position_ids", "labels"))
    learnt = torch.ones_like(rows, dtype=torch.bool) if labels is None else labels != _UNLEARNT
    for i, row in enumerate(rows):
        if mask is not None:
            yield _row(row[mask[i].bool()], learnt[i][mask[i].bool()])
        elif places is not None:
            starts = (places[i] == 0).nonzero().flatten().tolist()
            for start, end in itertools.pairwise([0, *starts, len(row)]):
                yield _row(row[start:end], learnt[i][start:end])
        else:
            yield _row(row, learnt[i])


def _alike(found: Any, rows: torch.Tensor) -> torch.Tensor | None:
    """What a collator says of each token; None if it does not."""
    if found is None or (told := torch.as_tensor(found)).shape != rows.shape:
        return None
    return told


def _row(ids: torch.Tensor, learnt: torch.Tensor) -> _Row:
    # Where nothing is learnt, nothing is lost by cutting it.
    return _Row(ids.tolist(), int(learnt.int().argmax()) if len(learnt) else 0)
