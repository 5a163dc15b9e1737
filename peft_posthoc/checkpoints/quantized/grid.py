"""Whole numbers of a few bits each, packed into words, and the weights that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor


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


def weight_of(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """(codes - zeros) * scales, in the scales' type: the difference is exact in it, and the product rounded once.

    Args:
        codes: Out x in features.
        zeros: Out features x groups.
        scales: The same.
        groups: Of every in feature, the group.
    """
    count = scales.shape[1]
    size = max(1, len(groups) // count)
    if not torch.equal(groups, torch.arange(len(groups)) // size) or size * count != len(groups):
        weight = codes.to(scales.dtype).sub_(zeros.to(scales.dtype).index_select(1, groups))
        return weight.mul_(scales.index_select(1, groups))
    # Neighbours share a group: three times as fast.
    weight = codes.unflatten(1, (count, size)).to(scales.dtype)
    decoded: Tensor = weight.sub_(zeros.to(scales.dtype)[..., None]).mul_(scales[..., None]).flatten(1)
    return decoded
