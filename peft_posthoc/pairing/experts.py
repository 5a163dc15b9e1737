"""Mixtures of experts: the matrices of every expert, however they are stored.

On disk each expert's matrices are tensors of their own (transformers 4, and what transformers 5 writes for most
models), or all experts' matrices are one stacked tensor (live modules in transformers 5, gpt-oss). An adapter holds
them per expert, as serving engines read them, or for the stacked parameter, as PEFT computes with them
(`target_parameters`). What is factored is always one matrix of one expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.view import Piece, View, same
from peft_posthoc.errors import MismatchError
from peft_posthoc.models.kinds import LINEAR
from peft_posthoc.models.layout import GUESSED, Layout, Stack, is_of_an_expert
from peft_posthoc.models.part import Part
from peft_posthoc.text import asked

Experts = Literal["none", "per-expert", "fused"]


def see_experts(
    base: Checkpoint, tuned: Checkpoint, layout: Layout, experts: Experts
) -> tuple[Checkpoint, Checkpoint, Layout]:
    """Both checkpoints with their experts in the same pieces, one for every matrix of an expert.

    Args:
        base: The checkpoint before.
        tuned: The checkpoint after; the two may store their experts differently.
        layout: Of both.
        experts: `fused` are pieces of the stacked parameters, `per-expert` the names of each expert's own modules.
            With `none` they stay as they are stored, if both store them alike.

    Raises:
        MismatchError: The model's experts have no modules of their own (gpt-oss).
    """
    if not layout.stacks:
        if experts == "fused" and layout.origin == GUESSED and any(map(is_of_an_expert, base.headers)):
            raise MismatchError(
                f"How the experts of `{base.label}` are stacked only its class knows: give a folder with config.json, "
                f"or leave them out with `{asked('experts', 'none')}`."
            )
        return base, tuned, layout
    if experts == "none" and _stacked(base, layout) == _stacked(tuned, layout):
        return base, tuned, layout
    if experts != "per-expert":
        return _fused(base, layout), _fused(tuned, layout), layout
    matrices = [stack for stack in layout.stacks if len(stack.shape) == 3]
    if whole := [stack.name for stack in matrices if not stack.parts]:
        raise MismatchError(
            f"The experts of this model are one parameter (`{whole[0]}`): give `{asked('experts', 'fused')}`."
        )
    modules = {part.removesuffix(".weight"): LINEAR for stack in matrices for parts in stack.parts for part in parts}
    layout = replace(layout, kinds={**layout.kinds, **layout.mistaken, **modules})
    return _per_expert(base, layout), _per_expert(tuned, layout), layout


def _stacked(checkpoint: Checkpoint, layout: Layout) -> set[str]:
    """The stacks that a checkpoint stores as one tensor each."""
    names = {layout.name_of(name) for name in checkpoint.headers}
    return {stack.name for stack in layout.stacks if stack.name in names}


def _fused(checkpoint: Checkpoint, layout: Layout) -> Checkpoint:
    stored = {layout.name_of(name): name for name in checkpoint.headers}
    pieces: dict[str, Piece] = {}
    taken: set[str] = set()
    for stack in layout.stacks:
        if stack.name in stored:
            name = stored[stack.name]
            taken.add(name)
            pieces |= _slices(checkpoint, stack, name)
        elif stack.parts and all(part in checkpoint.headers for parts in stack.parts for part in parts):
            taken |= {part for parts in stack.parts for part in parts}
            pieces |= {unit: _joined(checkpoint, parts) for unit, parts in zip(stack.units, stack.parts, strict=True)}
    return _with(checkpoint, pieces, taken)


def _per_expert(checkpoint: Checkpoint, layout: Layout) -> Checkpoint:
    stored = {layout.name_of(name): name for name in checkpoint.headers}
    pieces: dict[str, Piece] = {}
    taken: set[str] = set()
    for stack in layout.stacks:
        if stack.name in stored and stack.parts:
            name = stored[stack.name]
            taken.add(name)
            slices = _slices(checkpoint, stack, name)
            for unit, parts in zip(stack.units, stack.parts, strict=True):
                piece = slices[unit]
                rows = piece.header.shape[0] // len(parts)
                for index, part in enumerate(parts):
                    header = Header((rows, *piece.header.shape[1:]), piece.header.dtype)
                    make = partial(_rows, piece, index * rows, rows)
                    pieces[part] = Piece(piece.sources, header, make)
    return _with(checkpoint, pieces, taken)


def _slices(checkpoint: Checkpoint, stack: Stack, name: str) -> dict[str, Piece]:
    """A stacked tensor as the model's own matrices, one for each expert."""
    header = checkpoint.headers[name]
    if len(stack.shape) != 3 or len(header.shape) != 3:
        return {stack.name: same(checkpoint, name)}
    # Some models are stored the other way round than they compute (Qwen3-VL-MoE).
    turned = header.shape != stack.shape and (header.shape[0], header.shape[2], header.shape[1]) == stack.shape
    shape = stack.shape[1:] if turned else header.shape[1:]
    units = [str(Part(stack.name, expert)) for expert in range(header.shape[0])]
    return {
        unit: Piece((name,), Header(shape, header.dtype), partial(_slice, index, turned))
        for index, unit in enumerate(units)
    }


def _slice(index: int, turned: bool, tensor: Tensor) -> Tensor:
    return tensor[index].mT if turned else tensor[index]


def _rows(piece: Piece, start: int, count: int, tensor: Tensor) -> Tensor:
    return piece.make(tensor).narrow(0, start, count)


def _joined(checkpoint: Checkpoint, parts: tuple[str, ...]) -> Piece:
    """The parts of one expert's matrix (gate and up), one above the other."""
    headers = [checkpoint.headers[part] for part in parts]
    if len(parts) == 1:
        return same(checkpoint, parts[0])
    shape = (sum(header.shape[0] for header in headers), *headers[0].shape[1:])
    return Piece(parts, Header(shape, headers[0].dtype), _above_one_another)


def _above_one_another(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


def _with(checkpoint: Checkpoint, pieces: dict[str, Piece], taken: Iterable[str]) -> Checkpoint:
    if not pieces:
        return checkpoint
    taken = set(taken)
    others = {name: same(checkpoint, name) for name in checkpoint.headers if name not in taken}
    return View(checkpoint, {**others, **pieces}, loadable=True, module=checkpoint.module)
