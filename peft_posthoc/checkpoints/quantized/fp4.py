"""Weights of 4-bit floats, two in a byte, and a scale for each 16 or 32 neighbours: NVFP4 and MXFP4."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.quantized.coded import Coded, Stored
from peft_posthoc.checkpoints.quantized.grid import eight_rows, fill, numbers
from peft_posthoc.checkpoints.quantized.scaled import factor, is_half
from peft_posthoc.errors import CheckpointError

_BYTES = (torch.uint8, torch.int8)
# The values of the codes 0 to 7; those from 8 on are negative.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def weights(stored: Stored) -> Iterator[tuple[str, Coded]]:
    """Every weight that is stored so.

    The codes are `X.weight_packed` (compressed-tensors), `X.weight` (ModelOpt; DeepSeek's experts), or `X_blocks` of a
    stack of experts (gpt-oss). Beside those of NVFP4 there is a second scale for the whole weight: compressed-tensors
    divides by it, ModelOpt multiplies.
    """
    for name, header in stored.headers.items():
        if header.dtype not in _BYTES:
            continue
        if name.endswith("_blocks") and len(header.shape) == 4:
            scale = f"{name.removesuffix('_blocks')}_scales"
            if scale in stored.headers:
                _check(name, header.shape[:-1], scale, stored.headers[scale].shape)
                experts, out, groups, half = header.shape
                shown = Header((experts, groups * half * 2, out), stored.dtype)
                make = partial(_stack, dtype=stored.dtype)
                yield scale.removesuffix("_scales"), Coded((name, scale), shown, make, 4, "MXFP4")
        elif name.endswith((".weight_packed", ".weight")) and len(header.shape) == 2:
            found = _matrix(stored, name, header)
            if found is not None:
                yield f"{name.rpartition('.')[0]}.weight", found


def _matrix(stored: Stored, name: str, header: Header) -> Coded | None:
    scale = stored.beside(name, "weight_scale", "weight_scale_inv", "scale")
    if scale is None:
        return None
    shape = stored.headers[scale].shape
    shown = Header((header.shape[0], header.shape[1] * 2), stored.dtype)
    beside = stored.all_beside(name, "input_scale", "input_global_scale", "activation_scale")
    if is_half(stored, scale):
        if shape != (header.shape[0], header.shape[1] // 16):
            return None
        return Coded((name, scale), shown, partial(matrix, dtype=stored.dtype), 4, "MXFP4", beside=beside)
    second = stored.beside(name, "weight_global_scale", "weight_scale_2")
    if second is None:
        return None
    _check(name, (header.shape[0], header.shape[1] // 8), scale, shape)
    make = partial(matrix, divide=second.endswith("global_scale"), dtype=stored.dtype)
    return Coded((name, scale, second), shown, make, 4, "NVFP4", beside=beside)


def _check(name: str, wanted: tuple[int, ...], scale: str, found: tuple[int, ...]) -> None:
    if wanted != found:
        raise CheckpointError(f"`{scale}` is {found}; for `{name}` it would be {wanted}.")


def matrix(
    codes: Tensor,
    scale: Tensor,
    second: Tensor | None = None,
    *,
    dtype: torch.dtype,
    divide: bool = False,
    high_first: bool = False,
) -> Tensor:
    """The weight of a linear layer, out x in features.

    Args:
        codes: Bytes, out x in features / 2.
        scale: Of every group of neighbours, out features x groups.
        second: A scale for all.
        dtype: Of what is made.
        divide: Whether the second scale divides the first.
        high_first: Whether the upper half of a byte is the first of two neighbours.
    """
    values = _values()
    halves = values.repeat(16), values.repeat_interleave(16)  # Of every byte, the lower and the upper.
    table = torch.stack(halves[::-1] if high_first else halves, 1)
    scales = factor(scale)
    if second is not None:
        scales = scales.div_(second.float()) if divide else scales.mul_(second.float())

    def part(rows: slice) -> Tensor:
        found = numbers(codes[rows], table)
        found.unflatten(1, (scales.shape[1], -1)).mul_(scales[rows, :, None])
        return found

    return fill(torch.empty(len(codes), codes.shape[1] * 2, dtype=dtype), part)


def _values() -> Tensor:
    """What each code stands for."""
    return torch.tensor([*_VALUES, *(-value for value in _VALUES)])


def _stack(blocks: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """A stack of experts as the model has it, (experts, in, out)."""
    experts, out, groups, half = blocks.shape
    made = torch.empty(experts, groups * half * 2, out, dtype=dtype)
    values = _values()

    def part(words: Tensor, factors: Tensor, rows: slice) -> Tensor:
        codes = eight_rows(words[rows.start // 8 : rows.stop // 8])
        found = values.index_select(0, codes.flatten()).view(codes.shape)
        found.unflatten(0, (-1, 2 * half)).mul_(factors[rows.start // (2 * half) : rows.stop // (2 * half), None])
        return found

    for matrix, codes, scale in zip(made, blocks, scales, strict=True):
        # As words they are turned in a third of the time of bytes.
        words = codes.flatten(1).view(torch.int32).T.contiguous()
        fill(matrix, partial(part, words, factor(scale).T.contiguous()), every=2 * half)
    return made
