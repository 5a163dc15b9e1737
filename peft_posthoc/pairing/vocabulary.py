"""Two checkpoints whose vocabularies have different sizes: tokens were added, or the matrices padded."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.view import Piece, View, same
from peft_posthoc.models.layout import Layout
from peft_posthoc.models.part import Part
from peft_posthoc.text import asked

Vocab = Literal["error", "truncate", "extend"]


class Vocabulary(NamedTuple):
    """Both checkpoints with vocabularies of one size."""

    base: Checkpoint
    tuned: Checkpoint
    resized: frozenset[str]
    """The tensors that are kept whole, since their rows are no longer the base's."""
    notes: tuple[str, ...] = ()


def resized(base: Checkpoint, tuned: Checkpoint, layout: Layout) -> dict[str, tuple[int, int]]:
    """By tensor with a row for each token, how many rows base and tuned have, where these differ."""
    apart = {
        name: (header.shape[0], tuned.headers[name].shape[0])
        for name, header in base.headers.items()
        if name in tuned.headers
        and len(header.shape) == len(tuned.headers[name].shape) > 0
        and header.shape[1:] == tuned.headers[name].shape[1:]
        and header.shape != tuned.headers[name].shape
    }
    # An embedding's or the head's sizes are those of the vocabulary; biases of a head have the same.
    heads = {layout.tokens, layout.head} - {None}
    sizes = {apart[name] for name in apart if any(place.module in heads for place in layout.places(name))}
    return {name: rows for name, rows in apart.items() if rows in sizes}


def see_vocabulary(base: Checkpoint, tuned: Checkpoint, layout: Layout, vocab: Vocab) -> Vocabulary:
    """Bring both to one size.

    Args:
        base: The checkpoint before.
        tuned: The checkpoint after.
        layout: Of both.
        vocab: `truncate` the tuned one's to the base's: what lies beyond is a tensor of its own, `NAME[ROWS:]`, and
            what is missing is the base's. `extend` the base's to the tuned one's, or cut it. `error` leaves them as
            they are: the plan refuses them.
    """
    apart = resized(base, tuned, layout)
    if vocab == "error" or not apart:
        return Vocabulary(base, tuned, frozenset())
    before, after = next(iter(apart.values()))
    if vocab == "truncate":
        rows = {name: before for name, (before, _) in apart.items()}
        what = f"those beyond {before} are left out" if after > before else f"those beyond {after} stay the base's"
        notes = (f"Vocabulary: base has {before} rows, tuned {after}; {what}.",)
        return Vocabulary(base, _cut(_filled(tuned, base, rows), rows), frozenset(), notes)
    rows = {name: after for name, (_, after) in apart.items()}
    notes = (
        f"Vocabulary: base has {before} rows, tuned {after}. Before the adapter is loaded, the base needs "
        f"`model.resize_token_embeddings({after})`.",
    )
    return Vocabulary(_cut(_padded(base, rows), rows, rest=False), tuned, frozenset(apart), notes)


def _cut(checkpoint: Checkpoint, rows: dict[str, int], *, rest: bool = True) -> Checkpoint:
    """Of these tensors the first rows; and what follows as a tensor of its own, if it counts."""
    pieces: dict[str, Piece] = {}
    for name, header in checkpoint.headers.items():
        whole, wanted = same(checkpoint, name), rows.get(name)
        if wanted is None or header.shape[0] <= wanted:
            pieces[name] = whole
            continue
        parts = [(name, 0, wanted), (str(Part(name, wanted, to_end=True)), wanted, header.shape[0] - wanted)]
        for part, start, count in parts if rest else parts[:1]:
            pieces[part] = Piece(
                (name,), Header((count, *header.shape[1:]), header.dtype), partial(_rows, start, count)
            )
    return _view(checkpoint, pieces)


def _padded(checkpoint: Checkpoint, rows: dict[str, int]) -> Checkpoint:
    pieces: dict[str, Piece] = {}
    for name, header in checkpoint.headers.items():
        more = rows.get(name, 0) - header.shape[0] if name in rows else 0
        pieces[name] = same(checkpoint, name)
        if more > 0:
            shape = (rows[name], *header.shape[1:])
            pieces[name] = Piece((name,), Header(shape, header.dtype), partial(_with_zeros, more))
    return _view(checkpoint, pieces)


def _filled(checkpoint: Checkpoint, base: Checkpoint, rows: dict[str, int]) -> Checkpoint:
    """With the base's rows where it has fewer: the adapter then fits the base as it is."""
    pieces: dict[str, Piece] = {}
    for name, header in checkpoint.headers.items():
        pieces[name] = same(checkpoint, name)
        if header.shape and header.shape[0] < rows.get(name, 0):
            shape = (rows[name], *header.shape[1:])
            pieces[name] = Piece((name,), Header(shape, header.dtype), partial(_with_rows_of, base, name))
    return _view(checkpoint, pieces)


def _with_rows_of(base: Checkpoint, name: str, tensor: Tensor) -> Tensor:
    return torch.cat([tensor, base.read(name)[len(tensor) :].to(tensor)])


def _view(checkpoint: Checkpoint, pieces: dict[str, Piece]) -> Checkpoint:
    return View(checkpoint, pieces, loadable=True, module=checkpoint.module)


def _rows(start: int, count: int, tensor: Tensor) -> Tensor:
    return tensor.narrow(0, start, count)


def _with_zeros(count: int, tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(count, *tensor.shape[1:])])


def way_out(names: Collection[str], sizes: tuple[int, int]) -> str:
    """The ways out of vocabularies of these sizes, for an error."""
    before, after = sizes
    return (
        f"The vocabularies differ: {before} rows in base, {after} in tuned ({', '.join(sorted(names)[:3])}). "
        f"`{asked('vocab', 'truncate')}` leaves out the rows that only one of them has; `{asked('form', 'peft')}` with "
        f"`{asked('vocab', 'extend')}` keeps the tuned embeddings whole."
    )
