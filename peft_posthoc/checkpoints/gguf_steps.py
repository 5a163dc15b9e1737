"""How far apart the values are that a GGUF type can stand for, asked of the arithmetic that decodes it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Values that share their scale in every type that has one for each few.
_TOGETHER = 16


def beside(blocks: Any, kind: Any) -> Any | None:
    """The same blocks with each code the next one or the one before; None of a type whose codes stand for several.

    Args:
        blocks: Bytes of whole blocks.
        kind: One of `gguf.GGMLQuantizationType`.
    """
    lowest = _lowest_bits(kind)
    return None if lowest is None else (blocks.reshape(-1, len(lowest)) ^ lowest).reshape(-1)


def gaps(values: Tensor) -> Tensor:
    """The smallest distance of different values among those that share a scale, for each; as good as codebooks have it.

    Args:
        values: As they are decoded; zeros where all that share a scale are one.
    """
    few = values.view(-1, _TOGETHER).sort(-1).values.diff(dim=-1)
    smallest = torch.where(few > 0, few, torch.inf).amin(-1, keepdim=True)
    return torch.where(smallest.isfinite(), smallest, 0).expand(-1, _TOGETHER).reshape(values.shape)


@cache
def _lowest_bits(kind: Any) -> Any | None:
    """The bits of a block that change one value each, and that as little as can be: found by flipping every bit."""
    import gguf

    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    at = np.arange(8 * size)
    found = np.full(per_block, -1)
    random = np.random.default_rng(0)
    for _ in range(8):  # A scale that happens to be zero hides its values.
        block = random.integers(0, 60, size, dtype=np.uint8)
        flipped = np.tile(block, (8 * size, 1))
        flipped[at, at // 8] ^= (1 << at % 8).astype(np.uint8)
        before, after = gguf.dequantize(block[None], kind)[0], gguf.dequantize(flipped, kind).reshape(-1, per_block)
        alone = ((after != before).sum(1) == 1)[:, None] & (after != before) & (after != -before)  # and no sign
        change = np.where(alone, np.abs(after - before), np.inf)
        smallest = change.argmin(0)
        found = np.where((found < 0) & np.isfinite(change.min(0)), smallest, found)
    if (found < 0).any():
        return None
    mask = np.zeros(size, np.uint8)
    np.bitwise_or.at(mask, found // 8, (1 << found % 8).astype(np.uint8))
    return mask
