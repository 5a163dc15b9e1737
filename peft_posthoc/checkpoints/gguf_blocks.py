"""The values of GGUF blocks: as the `gguf` package has them, the types of 256 values that most files hold faster.

`gguf` decodes in NumPy, in rows of 32 bytes. The same codes are taken here from eight bytes at a time, and multiplied
in the same order, so that the values are the same to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LOW = 0x0F0F0F0F0F0F0F0F


def decode(blocks: Tensor, kind: Any, out: Tensor) -> None:
    """Write the values of whole blocks.

    Args:
        blocks: uint8, one block a row.
        kind: One of `gguf.GGMLQuantizationType`.
        out: float32, one block a row.
    """
    import gguf

    own = _OWN.get(kind.name)
    if own is None:
        out.view(-1).copy_(torch.from_numpy(gguf.dequantize(blocks.view(-1).numpy(), kind)))
    else:
        own(blocks, out)


def _four(blocks: Tensor, out: Tensor) -> None:
    """Q4_K: scales, and 4 x (32 lower halves of bytes, 32 upper)."""
    _times(_halves(blocks.view(torch.int64)[:, 2:].unflatten(1, (4, 4))), blocks, out)


def _five(blocks: Tensor, out: Tensor) -> None:
    """Q5_K: scales, the fifth bits (of eight rows in one byte), and the codes as in Q4_K."""
    words = blocks.view(torch.int64)
    codes = _halves(words[:, 6:].unflatten(1, (4, 4)))
    _add_bits(codes.flatten(1, 2), words[:, 2:6], each=1)
    _times(codes, blocks, out)


def _six(blocks: Tensor, out: Tensor) -> None:
    """Q6_K: twice 64 bytes of lower halves, twice 32 bytes of upper bits, 16 scales, and their scale."""
    words = blocks[:, :192].contiguous().view(torch.int64)
    codes = _halves(words[:, :16].unflatten(1, (2, 8)))
    for codes_of, bits in zip(codes.flatten(2).unflatten(2, (4, 4)).unbind(1), words[:, 16:].split(4, 1), strict=True):
        _add_bits(codes_of, bits, each=2)
    scales = _float(blocks[:, 208:]) * blocks[:, 192:208].contiguous().view(torch.int8)
    signed = codes.view(torch.int8).view(-1, 16, 16).sub_(32)
    torch.mul(signed, scales.unsqueeze(-1), out=out.view(-1, 16, 16))


_OWN = {"Q4_K": _four, "Q5_K": _five, "Q6_K": _six}


def _halves(words: Tensor) -> Tensor:
    """The lower four bits of each byte, and beside them the upper four: (blocks, rows, 2, words)."""
    return torch.stack([words & _LOW, (words >> 4) & _LOW], 2)


def _add_bits(codes: Tensor, bits: Tensor, *, each: int) -> None:
    """Put above the four bits of each row's codes the next one or two of each byte: those of row 0 are the lowest."""
    mask = int.from_bytes(bytes([(1 << each) - 1 << 4] * 8), "little")
    for row in range(codes.shape[1]):
        up = 4 - each * row
        codes[:, row] |= (bits << up if up > 0 else bits >> -up) & mask


def _times(codes: Tensor, blocks: Tensor, out: Tensor) -> None:
    """Scale x code - offset, with both, of six bits for each 32 values, from the first 16 bytes of a block."""
    first, second, both = blocks[:, 4:16].contiguous().view(torch.int32).unbind(1)
    six, low, upper = 0x3F3F3F3F, 0x0F0F0F0F, 0x30303030
    scales = [first & six, (both & low) | ((first >> 2) & upper)]
    offsets = [second & six, ((both >> 4) & low) | ((second >> 2) & upper)]
    packed = torch.stack(scales + offsets, 1).view(torch.uint8).view(-1, 2, 8)
    factor, offset = (_float(blocks[:, :4]).unsqueeze(-1) * packed).unsqueeze(-1).unbind(1)
    torch.mul(codes.view(torch.uint8).view(-1, 8, 32), factor, out=out.view(-1, 8, 32)).sub_(offset)


def _float(halves: Tensor) -> Tensor:
    return halves.contiguous().view(torch.float16).float()
