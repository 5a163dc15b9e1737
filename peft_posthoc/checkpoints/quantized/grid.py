"""Codes of a few bits each, packed into bytes and words, and the weights that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

# Values that are made at once: what they are made of stays in the cache, several times as fast as all at once.
_AT_ONCE = 1 << 17
# What is as wide as so many values of float32, and is looked up as one.
_WIDE = {1: torch.int32, 2: torch.int64, 4: torch.complex128}


def fill(matrix: Tensor, make: Callable[[slice], Tensor], *, every: int = 1) -> Tensor:
    """The matrix, filled with what is made of some rows at a time.

    Args:
        matrix: What is filled.
        make: Of a part of the rows, their values; they are rounded to the matrix's type.
        every: Parts are of so many rows, or of a multiple of it.
    """
    count = len(matrix)
    step = max(_AT_ONCE // (every * max(matrix.shape[1], 1)), 1) * every
    for at in range(0, count, step):
        rows = slice(at, min(at + step, count))
        matrix[rows] = make(rows)
    return matrix


def numbers(codes: Tensor, table: Tensor) -> Tensor:
    """What is in a table for each byte, in float32, side by side.

    Args:
        codes: Bytes, of any type.
        table: For each byte one, two or four values.
    """
    each = table.shape[1]
    at = codes.contiguous().view(torch.uint8).flatten().int()
    found: Tensor = table.view(_WIDE[each]).flatten().index_select(0, at).view(torch.float32)
    return found.view(*codes.shape[:-1], codes.shape[-1] * each)


def whole(words: Tensor, bits: int) -> Tensor:
    """The numbers that lie along the last side of words, as `unpacked` has them, in float32."""
    if bits not in (2, 4, 8):
        return unpacked(words, bits).float()
    return numbers(words.contiguous().view(torch.uint8), _in_bytes(bits))


@cache
def _in_bytes(bits: int) -> Tensor:
    """The numbers in each byte."""
    return unpacked(torch.arange(256, dtype=torch.uint8)[:, None], bits).float()


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The numbers that lie along the last side of words, low bits first and across the words' borders, as uint8.

    Args:
        words: Of any integer type.
        bits: Of a number, at most 8.
    """
    parts = words.contiguous().view(torch.uint8)
    # So many bytes hold a whole number of numbers.
    together = bits if 8 % bits else 1
    joined = parts
    if together > 1:
        parts = torch.nn.functional.pad(parts, (0, -parts.shape[-1] % together))
        rows = parts.unflatten(-1, (-1, together)).to(torch.int32 if together < 4 else torch.int64)
        joined = rows[..., 0].clone()
        for at in range(1, together):
            joined |= rows[..., at] << (8 * at)
    places = range(0, 8 * together, bits)
    return torch.stack([((joined >> at) & (2**bits - 1)).to(torch.uint8) for at in places], -1).flatten(-2)


def eight_rows(words: Tensor, places: Sequence[int] = range(8)) -> Tensor:
    """The numbers of 4 bits in each row of words of int32, as eight rows of them.

    Args:
        words: Rows of words.
        places: Where a word has the number of each of the eight rows, from its low end.
    """
    return (words[:, None] >> torch.tensor(places, dtype=torch.int32)[:, None] * 4).bitwise_and_(15).flatten(0, 1)


def weight_of(
    codes: Callable[[slice], Tensor], zeros: Tensor, scales: Tensor, groups: Tensor, every: int = 1
) -> Tensor:
    """(codes - zeros) * scales, in the scales' type: in float32 both are exact, and the product is rounded once.

    Args:
        codes: Of some rows, the numbers in float32, rows x in features.
        zeros: Out features x groups.
        scales: The same.
        groups: Of every in feature, the group.
        every: Rows come in so many, or in a multiple of it.
    """
    n, count = len(groups), scales.shape[1]
    size = max(1, n // count)
    together = size * count == n and torch.equal(groups, torch.arange(n) // size)
    low, factors = zeros.contiguous().float(), scales.contiguous().float()

    def made(rows: slice) -> Tensor:
        numbers = codes(rows)
        if not together:
            return numbers.sub_(low[rows].index_select(1, groups)).mul_(factors[rows].index_select(1, groups))
        # Neighbours share a group: three times as fast.
        numbers.unflatten(1, (count, size)).sub_(low[rows, :, None]).mul_(factors[rows, :, None])
        return numbers

    return fill(torch.empty(len(scales), n, dtype=scales.dtype), made, every=every)
