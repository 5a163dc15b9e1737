"""LoHa and LoKr, two of LyCORIS' forms: products of factors that are no factors of the delta, seen as the delta."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Set

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.view import Piece, View, same

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = re.compile(r"lokr_w[12](_[ab])?")


def as_differences(file: Checkpoint) -> Checkpoint:
    """A file in which each LoHa or LoKr is the difference that it makes of a weight, `MODULE.diff`.

    What is more than that (Tucker's form for convolutions, DoRA) stays as it is.
    """
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for name in file.headers:
        module, _, part = name.rpartition(".")
        modules[module][part] = name
    pieces: dict[str, Piece] = {}
    for module, parts in modules.items():
        if not _is_whole(parts.keys() - {"alpha"}) or (
            "alpha" in parts and math.prod(file.headers[parts["alpha"]].shape) != 1
        ):
            pieces |= {name: same(file, name) for name in parts.values()}
            continue
        shapes = {part: torch.empty(file.headers[name].shape, device="meta") for part, name in parts.items()}
        header = Header(tuple(_product(shapes, scaled=False).shape), torch.float32)
        order = tuple(parts)
        pieces[f"{module}.diff"] = Piece(
            tuple(parts.values()),
            header,
            lambda *tensors, order=order: _product(dict(zip(order, tensors, strict=True))),
        )
    return View(file, pieces)


def _is_whole(parts: Set[str]) -> bool:
    """Whether a module is a LoHa or a LoKr, all of it, and nothing else."""
    sides = ((f"lokr_w{number}", f"lokr_w{number}_a", f"lokr_w{number}_b") for number in "12")
    of_kron = all(whole in parts or {a, b} <= parts for whole, a, b in sides)
    return parts == {*_HADA} or (of_kron and all(_LOKR.fullmatch(part) for part in parts))


def _product(parts: Mapping[str, Tensor], *, scaled: bool = True) -> Tensor:
    """The delta, as ComfyUI's `comfy/weight_adapter/loha.py` and `lokr.py` and LyCORIS itself make it."""
    held = {part: tensor.float() for part, tensor in parts.items()}
    if _HADA[0] in held:
        first, second, third, fourth = (held[part] for part in _HADA)
        made, rank = (first @ second) * (third @ fourth), len(second)
    else:
        one, other = (_side(held, number) for number in "12")
        ranks = [len(held[f"lokr_w{number}_b"]) for number in "21" if f"lokr_w{number}_b" in held]
        made = torch.kron(one.reshape(*one.shape, *(1 for _ in other.shape[2:])), other)
        rank = ranks[0] if ranks else 0  # Of two whole matrices the alpha says nothing.
    if not scaled or "alpha" not in held or not rank:
        return made
    return made * (float(held["alpha"]) / rank)


def _side(held: Mapping[str, Tensor], number: str) -> Tensor:
    whole = held.get(f"lokr_w{number}")
    return held[f"lokr_w{number}_a"] @ held[f"lokr_w{number}_b"] if whole is None else whole


def in_shape(piece: Piece, wanted: tuple[int, ...]) -> Piece:
    """A difference in the shape of its weight: of a convolution, these are matrices."""
    if piece.header.shape == wanted or math.prod(piece.header.shape) != math.prod(wanted):
        return piece
    make = piece.make
    return Piece(piece.sources, Header(wanted, piece.header.dtype), lambda *tensors: make(*tensors).reshape(wanted))
