"""The steps of a grid: how far apart the values are that codes can stand for, asked of whatever decodes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def steps(decode: Callable[[Tensor], Tensor], codes: Tensor, bits: int, *, along: int = 0) -> Tensor:
    """The distance from each value to its neighbour on the grid, in float32.

    Args:
        decode: From codes to values.
        codes: As they are stored: whole numbers of so many bits in integers, or a type of one byte.
        bits: Of a code; where words hold several, the lowest bits first.
        along: The side along which words go on, where codes straddle them.
    """
    return torch.sub(decode(beside(codes, bits, along=along)).float(), decode(codes).float()).abs_()


def beside(codes: Tensor, bits: int, *, along: int = 0) -> Tensor:
    """The same codes, each the next one or the one before: its lowest bit is flipped."""
    if codes.dtype.is_floating_point and codes.itemsize > 1:  # Bytes, stored as that.
        codes = codes.contiguous().view(torch.uint8)
    if codes.dtype.is_floating_point:
        flipped = codes.view(torch.uint8) ^ 1
        if codes.dtype is torch.float8_e4m3fn:
            # The neighbour of the largest is no number: the one below it is as far.
            flipped = torch.where(flipped & 0x7F == 0x7F, flipped ^ 2, flipped)
        return flipped.view(codes.dtype)
    width = 8 * codes.itemsize
    lowest = [sum(1 << at for at in range(width) if (word * width + at) % bits == 0) for word in range(bits)]
    if width % bits == 0:
        return codes ^ _signed(lowest[0], width, codes.dtype)
    masks = torch.tensor([_signed(mask, width, codes.dtype) for mask in lowest], dtype=codes.dtype)
    count = codes.shape[along]
    sides = [-1 if side == along else 1 for side in range(codes.ndim)]
    return codes ^ masks.repeat(-(-count // bits))[:count].view(sides)


def _signed(mask: int, width: int, dtype: torch.dtype) -> int:
    """The bits as a number that the type holds."""
    return mask - (1 << width) if dtype.is_signed and mask >> (width - 1) else mask
