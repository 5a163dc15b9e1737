"""AWQ: numbers of 4 bits, in the orders of its kernels, and a scale and a zero for each group of in features."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_posthoc.checkpoints.quantized.grid import unpacked, weight_of

# Where a word has each of eight neighbours: a kernel gets 0 and 1, then 2 and 3, from the halves of a word at once.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def gemm(qweight: Tensor, scales: Tensor, qzeros: Tensor | None) -> Tensor:
    """The weight of a linear layer, out x in features, from words along the out features.

    Args:
        qweight: Words of numbers, in features x out features / 8.
        scales: Groups x out features.
        qzeros: Words of zeros, groups x out features / 8; None where all are the middle.
    """
    codes = _across(qweight)
    zeros = torch.full_like(scales.T, 8, dtype=torch.uint8) if qzeros is None else _across(qzeros)
    return weight_of(codes, zeros, scales.T, _groups(codes, len(scales)))


def gemv(qweight: Tensor, scales: Tensor, qzeros: Tensor, *, group: int) -> Tensor:
    """The same from words along the in features, in their own order; zeros and scales are filled up with more groups.

    Args:
        qweight: Words of numbers, out features x in features / 8.
        scales: Out features x groups.
        qzeros: Words of zeros, out features x groups / 8.
        group: In features of a group.
    """
    codes = unpacked(qweight, 4)
    count = codes.shape[1] // group
    return weight_of(codes, unpacked(qzeros, 4)[:, :count], scales[:, :count], _groups(codes, count))


def _across(words: Tensor) -> Tensor:
    """The numbers of words along the second side, as that many rows."""
    columns = words.T.contiguous()
    return torch.stack([((columns >> (4 * place)) & 15).to(torch.uint8) for place in _PLACES], 1).flatten(0, 1)


def _groups(codes: Tensor, count: int) -> Tensor:
    return torch.arange(codes.shape[1]) // (codes.shape[1] // count)
