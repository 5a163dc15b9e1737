"""Weights of 8 bits, floats or whole numbers, and a scale for each weight, row or block of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Header, place_of
from peft_posthoc.checkpoints.quantized.coded import Coded, Stored
from peft_posthoc.checkpoints.quantized.grid import fill, numbers
from peft_posthoc.checkpoints.quantized.undecoded import quantized
from peft_posthoc.errors import CheckpointError

FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
# Scales that are exponents of two.
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
# In every file that is known, where no configuration says another.
_BLOCK = 128
# What marks ComfyUI's older files.
_MARK = "scaled_fp8"
# What lies beside a weight and is not needed to decode it.
_BESIDE = (
    *(
        "input_scale",
        "input_scale_ub",
        "scale_input",
        "activation_scale",
        "input_global_scale",
        "input_zero_point",
        "comfy_quant",
    ),
)


def weights(stored: Stored) -> Iterator[tuple[str, Coded]]:
    """Every weight of 8 bits that has its scale beside it.

    The scale is `X.weight_scale_inv` (DeepSeek, Qwen; a factor all the same), `X.weight_scale` (compressed-tensors,
    ModelOpt, ComfyUI), `X.scale` (DeepSeek's own files) or `X.scale_weight` (ComfyUI's older files, which one tensor
    `scaled_fp8` marks); of a stack of experts `X_weight_scale` (ModelOpt).
    """
    marks = [name for name in stored.headers if name.rpartition(".")[2] == _MARK]
    for name, header in stored.headers.items():
        if header.dtype not in (*FLOATS, torch.int8):
            continue
        leaf = name.rpartition(".")[2]
        own = ("scale",) if leaf == "weight" else ()
        scale = stored.beside(name, f"{leaf}_scale_inv", f"{leaf}_scale", f"scale_{leaf}", f"{leaf}_weight_scale", *own)
        if scale is None or (header.dtype is torch.int8 and is_half(stored, scale)):
            continue
        zero = stored.beside(name, f"{leaf}_zero_point")
        blocks, by = _blocks(name, header.shape, scale, stored.headers[scale].shape, _told(stored, name))
        yield (
            name,
            Coded(
                (name, scale, *([zero] if zero else [])),
                Header(header.shape, stored.dtype),
                partial(weight, blocks=blocks, dtype=stored.dtype),
                8,
                f"{'INT8' if header.dtype is torch.int8 else 'FP8'}{by}",
                beside=(*stored.all_beside(name, *_BESIDE, f"{leaf}_input_scale"), *marks),
            ),
        )


def as_they_are(stored: Stored) -> Iterator[tuple[str, Coded]]:
    """Every tensor of 8-bit floats of a single file as the numbers that it holds: image models are cast so.

    None where anything tells of scales, or there is a folder that may have lost them.
    """
    checkpoint = stored.checkpoint
    tells = any(one.is_part for one in quantized(checkpoint).values()) or any(
        name.rpartition(".")[2] == _MARK for name in stored.headers
    )
    if stored.told or tells or checkpoint.identity is None or place_of(checkpoint) is not None:
        return
    for name, header in stored.headers.items():
        if header.dtype in FLOATS:
            cast = partial(Tensor.to, dtype=stored.dtype)
            yield name, Coded((name,), Header(header.shape, stored.dtype), cast, 8, "FP8 without scales")


def is_half(stored: Stored, scale: str) -> bool:
    """Tell whether integers that this is the scale of hold two floats of 4 bits each, as DeepSeek's experts do."""
    return stored.headers[scale].dtype in _EXPONENTS or stored.method == "fp8"


class Blocks(NamedTuple):
    """How a scale lies on codes."""

    matrices: tuple[int, int, int]
    """The codes as matrices: how many, their rows and their columns."""
    grid: tuple[int, int, int]
    """Of a matrix, so many blocks along rows and columns."""
    size: tuple[int, int]
    """Rows and columns of a block; the last may be cut off."""


def weight(codes: Tensor, scale: Tensor, zero: Tensor | None = None, *, blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """(codes - zero) * scale, computed in float32 and rounded once."""
    made = torch.empty(codes.shape, dtype=dtype)
    scales = factor(scale).reshape(blocks.grid)
    zeros = None if zero is None else zero.float().reshape(blocks.grid)
    table = None if codes.dtype is torch.int8 else _table(codes.dtype)
    of_matrices = codes.reshape(blocks.matrices)

    def part(at: int, rows: slice) -> Tensor:
        own = of_matrices[at, rows]
        # PyTorch converts floats of a byte more slowly than they are looked up.
        found = own.float() if table is None else numbers(own, table)
        if zeros is not None:
            found.sub_(_along(zeros[at], rows, blocks))
        return found.mul_(_along(scales[at], rows, blocks))

    for at, matrix in enumerate(made.view(blocks.matrices)):
        fill(matrix, partial(part, at))
    return made


def factor(scale: Tensor) -> Tensor:
    """A scale as float32; bytes are exponents of two (ue8m0)."""
    if scale.dtype == torch.uint8:
        return scale.float().sub_(127).exp2_()
    return numbers(scale, _table(scale.dtype)) if scale.dtype.itemsize == 1 else scale.float()


def _table(dtype: torch.dtype) -> Tensor:
    """What each byte is as a float of that type."""
    return torch.arange(256).to(torch.uint8).view(dtype).float()[:, None]


def _along(scale: Tensor, rows: slice, blocks: Blocks) -> Tensor:
    """A block's number at each of its columns, for some rows: for one, where they are of one row of blocks."""
    first, last = rows.start // blocks.size[0], (rows.stop - 1) // blocks.size[0]
    own = scale[first : last + 1] if first == last else scale[torch.arange(rows.start, rows.stop) // blocks.size[0]]
    return own if own.shape[1] == 1 else own.repeat_interleave(blocks.size[1], 1)[:, : blocks.matrices[2]]


def _told(stored: Stored, name: str) -> Sequence[int]:
    """The size of a block of a weight, as far as anything says it."""
    layer = stored.layer(name)
    if layer and layer.get("group_size"):
        return [int(layer["group_size"])] * 2
    told = [stored.told.get("weight_block_size"), *(one.get("block_structure") for one in stored.schemes)]
    return next((one for one in told if isinstance(one, list) and len(one) == 2), [_BLOCK, _BLOCK])


def _blocks(
    name: str, shape: tuple[int, ...], scale: str, of_scale: tuple[int, ...], told: Sequence[int]
) -> tuple[Blocks, str]:
    """How a scale lies on a weight, and a word for it.

    Raises:
        CheckpointError: It is for neither a weight nor its rows or blocks.
    """
    rows = shape[0] if shape else 1
    columns = torch.Size(shape).numel() // max(rows, 1)
    if torch.Size(of_scale).numel() == 1:
        return Blocks((1, rows, columns), (1, 1, 1), (max(rows, 1), columns)), ""
    # ModelOpt writes blocks as (rows, 1, columns, 1).
    held = of_scale[::2] if len(of_scale) == 4 and of_scale[1] == of_scale[3] == 1 and len(shape) == 2 else of_scale
    if held in ((rows,), (rows, *[1] * (len(shape) - 1))):
        return Blocks((1, rows, columns), (1, rows, 1), (1, columns)), " by row"
    held = (*held, 1) if len(shape) == 3 and held == shape[:2] else held
    if len(held) == len(shape) and len(shape) in (2, 3) and held[:-2] == shape[:-2]:
        size = [_size(*side) for side in zip(shape[-2:], held[-2:], told, strict=True)]
        if all(size):
            count = torch.Size(shape[:-2]).numel()
            by = " by row" if size == [1, shape[-1]] else " by block"
            return Blocks((count, shape[-2], shape[-1]), (count, held[-2], held[-1]), (size[0], size[1])), by
    raise CheckpointError(f"`{scale}` is {of_scale}; it scales neither `{name}` ({shape}) nor its rows or blocks.")


def _size(side: int, count: int, told: int) -> int:
    """The size of so many blocks of a side, of which the last may be cut off; 0 if there is none."""
    evenly = -(-side // max(count, 1))
    return next((size for size in (told, _BLOCK, evenly) if size > 0 and -(-side // size) == count), 0)
