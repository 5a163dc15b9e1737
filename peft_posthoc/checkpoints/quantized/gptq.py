"""GPTQ: whole numbers along the in features, and a scale and a zero for each group of them."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_posthoc.checkpoints.quantized.grid import unpacked, weight_of


def gptq(
    qweight: Tensor, scales: Tensor, qzeros: Tensor | None, g_idx: Tensor | None, *, bits: int, offset: int, group: int
) -> Tensor:
    """The weight of a linear layer, out x in features.

    Args:
        qweight: Words of numbers, in features * bits / 32 x out features.
        scales: Groups x out features.
        qzeros: Words of zeros, groups x out features * bits / 32; None where all are the middle.
        g_idx: Of every in feature, its group; None where neighbours share one.
        bits: Of a number.
        offset: What the stored zeros lack: 1 in the first version of the format, 0 in the second.
        group: How many in features share a group, where `g_idx` does not say.
    """
    codes = unpacked(qweight.T, bits)
    if g_idx is None or not len(g_idx):
        g_idx = torch.arange(codes.shape[1]) // group
    zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
    if qzeros is not None:
        # Zero itself is stored as the largest number in the first version. GPTQModel reads it so; kernels made after
        # ExLlama's take it for 2**bits, which no quantizer writes.
        zeros = (unpacked(qzeros, bits)[:, : scales.shape[1]] + offset) & (2**bits - 1)
    return weight_of(codes[:, : len(g_idx)], zeros.T, scales.T, g_idx.long())
