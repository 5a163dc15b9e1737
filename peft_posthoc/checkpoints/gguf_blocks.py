"""The values of GGUF blocks: as the `gguf` package has them, those of the types that most files hold faster.

`gguf` decodes in NumPy, in rows of a few bytes. The same codes are taken here from eight bytes at a time, and
multiplied in the same order, so that the values are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
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


# Of 32 values: a scale, perhaps an offset, perhaps four bytes of fifth bits; and 16 lower halves of bytes, 16 upper.


def _signed(blocks: Tensor, out: Tensor, *, five: bool = False) -> None:
    """Q4_0, Q5_0: the codes less the one in their middle."""
    codes = _of_32(blocks, 2, five=five).view(torch.int8).sub_(16 if five else 8)
    torch.mul(codes, _float(blocks[:, :2]), out=out)


def _offset(blocks: Tensor, out: Tensor, *, five: bool = False) -> None:
    """Q4_1, Q5_1."""
    codes = _of_32(blocks, 4, five=five).view(torch.uint8)
    torch.mul(codes, _float(blocks[:, :2]), out=out).add_(_float(blocks[:, 2:4]))


def _of_32(blocks: Tensor, start: int, *, five: bool) -> Tensor:
    """The codes, eight in a word; of five bits, the fifths are the first four bytes."""
    codes = _halves(_words(blocks[:, start + 4 * five :]).unsqueeze(1)).flatten(1)
    if five:
        spread = _fifth_bits().index_select(0, blocks[:, start : start + 4].flatten().int())
        codes |= spread.view(-1, 4)
    return codes


@cache
def _fifth_bits() -> Tensor:
    """By byte, its bits as the fifth ones of eight."""
    bits = torch.arange(256, dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8)
    return ((bits & 1) << 4).view(torch.int64).flatten()


# Of 32 or 16 values: halves of bytes again, which stand for numbers of a table.


def _nonlinear(blocks: Tensor, out: Tensor) -> None:
    """IQ4_NL."""
    torch.mul(_looked_up(blocks[:, 2:], 16, "IQ4_NL"), _float(blocks[:, :2]), out=out)


def _nonlinear_of_256(blocks: Tensor, out: Tensor) -> None:
    """IQ4_XS: a scale, upper two bits of eight more scales, lower four bits of them, and as in IQ4_NL."""
    upper = _apart(blocks[:, 2:4]).view(torch.int16) >> torch.arange(0, 16, 2, dtype=torch.int16)
    lower = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], 2).flatten(1)
    scales = _float(blocks[:, :2]) * ((lower | ((upper & 3) << 4)) - 32)
    torch.mul(_looked_up(blocks[:, 8:], 16, "IQ4_NL").view(-1, 8, 32), scales.unsqueeze(-1), out=out.view(-1, 8, 32))


def _microscaled(blocks: Tensor, out: Tensor) -> None:
    """MXFP4: a power of two, and numbers of twice 4 bits."""
    scale = _by_byte("MXFP4", "e8m0_to_fp32_half").index_select(0, blocks[:, 0].int())
    torch.mul(_looked_up(blocks[:, 1:], 16, "MXFP4"), scale.unsqueeze(-1), out=out)


def _microscaled_of_64(blocks: Tensor, out: Tensor) -> None:
    """NVFP4: four scales, each of 16 numbers."""
    scales = _by_byte("NVFP4", "ue4m3_to_fp32").index_select(0, blocks[:, :4].flatten().int())
    codes = _looked_up(blocks[:, 4:], 8, "NVFP4")
    torch.mul(codes.view(-1, 16), scales.unsqueeze(-1), out=out.view(-1, 16))


def _looked_up(stored: Tensor, together: int, kind: str) -> Tensor:
    """What halves of bytes stand for, int8: of so many bytes the lower ones, then their upper ones."""
    pairs = _apart(stored).view(torch.int16).flatten().int() & 0xFFFF
    found = [half.index_select(0, pairs).view(-1, together // 2) for half in _pairs(kind)]
    return torch.stack(found, 1).view(torch.int8).view(len(stored), -1)


@cache
def _pairs(kind: str) -> list[Tensor]:
    """By two bytes, what both lower halves stand for, and both upper ones; two int8 in an int16."""
    from gguf import quants

    table = torch.tensor(getattr(quants, kind).kvalues, dtype=torch.int8)
    both = torch.arange(1 << 16, dtype=torch.int32)
    return [
        torch.stack([table[both >> up & 15], table[both >> up + 8 & 15]], 1).view(torch.int16).flatten()
        for up in (0, 4)
    ]


@cache
def _by_byte(kind: str, scale: str) -> Tensor:
    """By byte, the scale that it is."""
    import numpy as np
    from gguf import quants

    return torch.from_numpy(getattr(getattr(quants, kind), scale)(np.arange(256, dtype=np.uint8))).float()


# Of 256 values.


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
    words = _words(blocks[:, :192])
    codes = _halves(words[:, :16].unflatten(1, (2, 8)))
    for codes_of, bits in zip(codes.flatten(2).unflatten(2, (4, 4)).unbind(1), words[:, 16:].split(4, 1), strict=True):
        _add_bits(codes_of, bits, each=2)
    scales = _float(blocks[:, 208:]) * _apart(blocks[:, 192:208]).view(torch.int8)
    signed = codes.view(torch.int8).view(-1, 16, 16).sub_(32)
    torch.mul(signed, scales.unsqueeze(-1), out=out.view(-1, 16, 16))


_OWN: dict[str, Callable[[Tensor, Tensor], None]] = {
    **{"Q4_0": _signed, "Q4_1": _offset},
    **{"Q5_0": partial(_signed, five=True), "Q5_1": partial(_offset, five=True)},
    **{"IQ4_NL": _nonlinear, "IQ4_XS": _nonlinear_of_256, "MXFP4": _microscaled, "NVFP4": _microscaled_of_64},
    **{"Q4_K": _four, "Q5_K": _five, "Q6_K": _six},
}


def _words(stored: Tensor) -> Tensor:
    """Eight bytes each."""
    return _apart(stored).view(torch.int64)


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
    first, second, both = _apart(blocks[:, 4:16]).view(torch.int32).unbind(1)
    six, low, upper = 0x3F3F3F3F, 0x0F0F0F0F, 0x30303030
    scales = [first & six, (both & low) | ((first >> 2) & upper)]
    offsets = [second & six, ((both >> 4) & low) | ((second >> 2) & upper)]
    packed = torch.stack(scales + offsets, 1).view(torch.uint8).view(-1, 2, 8)
    factor, offset = (_float(blocks[:, :4]).unsqueeze(-1) * packed).unsqueeze(-1).unbind(1)
    torch.mul(codes.view(torch.uint8).view(-1, 8, 32), factor, out=out.view(-1, 8, 32)).sub_(offset)


def _float(halves: Tensor) -> Tensor:
    return _apart(halves).view(torch.float16).float()


def _apart(stored: Tensor) -> Tensor:
    """A copy, which begins where wider types may: of one block `contiguous` makes none."""
    return stored.clone(memory_format=torch.contiguous_format)
