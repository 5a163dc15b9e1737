"""Weights of 4-bit floats, two in a byte, with a scale for every 16 or 32 of them: NVFP4 and MXFP4.

compressed-tensors decodes its own two in bfloat16, and rounds a scale before it is used. Engines multiply the 4-bit
value, the block's scale and the weight's in wider types; so it is done here, in float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.quantized.coded import Coded, Stored
from peft_posthoc.checkpoints.quantized.scaled import factor
from peft_posthoc.errors import CheckpointError

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_HALF, *(-value for value in _HALF)])
# Of every byte, its two values: the low half is the first.
_PAIRS = torch.stack([_VALUES.repeat(16), _VALUES.repeat_interleave(16)], 1)
_BLOCKS = "_blocks"


def fp4(stored: Stored) -> Iterator[tuple[str, Coded]]:
    """Every weight of 4-bit floats that has its scales beside it.

    compressed-tensors has `X.weight_packed`, and divides by `weight_global_scale`; ModelOpt has bytes as `X.weight`,
    and multiplies by `weight_scale_2`; gpt-oss has `X_blocks` and `X_scales` of all experts, in features last, where
    its model has them first; DeepSeek has int8 as `X.weight` among weights of 8-bit floats.
    """
    for name, header in stored.headers.items():
        parent, _, leaf = name.rpartition(".")
        if header.dtype == torch.uint8 and leaf.endswith(_BLOCKS) and len(header.shape) >= 3:
            scale = stored.beside(name, f"{leaf.removesuffix(_BLOCKS)}_scales")
            own, shape = name.removesuffix(_BLOCKS), (*header.shape[:-2], 2 * header.shape[-2] * header.shape[-1])
            shape = (*shape[:-2], shape[-1], shape[-2]) if len(shape) == 3 else shape
            over, form = None, "MXFP4"
            make = partial(_experts, dtype=stored.dtype)
        elif leaf == "weight_packed" and header.dtype == torch.uint8:
            scale, over = stored.beside(name, "weight_scale"), stored.beside(name, "weight_global_scale")
            own, shape = f"{parent}.weight" if parent else "weight", (*header.shape[:-1], 2 * header.shape[-1])
            form = "NVFP4" if over else "MXFP4"
            make = partial(weight, inverse=True, dtype=stored.dtype)
        elif leaf == "weight" and header.dtype == (torch.int8 if stored.method == "fp8" else torch.uint8):
            scale = stored.beside(name, "weight_scale", "weight_scale_inv")
            over = stored.beside(name, "weight_scale_2")
            own, shape = name, (*header.shape[:-1], 2 * header.shape[-1])
            form = "NVFP4" if over else "MXFP4"
            make = partial(weight, inverse=False, dtype=stored.dtype)
        else:
            continue
        if scale is None:
            continue
        _check(name, header.shape, scale, stored.headers[scale].shape)
        beside = stored.all_beside(name, "input_scale", "input_global_scale")
        sources = (name, scale, over) if over else (name, scale)
        yield own, Coded(sources, Header(shape, stored.dtype), make, 4, form, beside=beside)


def weight(
    codes: Tensor, scale: Tensor, over: Tensor | None = None, *, inverse: bool = False, dtype: torch.dtype
) -> Tensor:
    """Values times the scales of their blocks, times that of the weight.

    Args:
        codes: Bytes, ... x in features / 2.
        scale: ... x blocks; bytes are exponents of two.
        over: Of the whole weight.
        inverse: Whether `over` is divided by.
        dtype: Of the weight.
    """
    values = _PAIRS[codes.contiguous().view(torch.uint8).to(torch.int32)].flatten(-2)
    factors = factor(scale)
    if over is not None:
        factors = factors / over.float() if inverse else factors * over.float()
    size = values.shape[-1] // factors.shape[-1]
    found: Tensor = values.unflatten(-1, (-1, size)).mul_(factors[..., None]).flatten(-2).to(dtype)
    return found


def _experts(codes: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The same of blocks that are a side of their own, in features first in the end; an expert at a time."""
    if codes.ndim == 3:
        return weight(codes.flatten(-2), scale, dtype=dtype)
    parts = [weight(own.flatten(-2), by, dtype=dtype).T for own, by in zip(codes, scale, strict=True)]
    return torch.stack(parts)


def _check(name: str, shape: tuple[int, ...], scale: str, of_scale: tuple[int, ...]) -> None:
    """See that there is a scale for each block of a row.

    Raises:
        CheckpointError: There is not.
    """
    rows, own = (shape[:-2], 2 * shape[-2] * shape[-1]) if name.endswith(_BLOCKS) else (shape[:-1], 2 * shape[-1])
    if of_scale[:-1] != rows or not of_scale[-1] or own % of_scale[-1]:
        raise CheckpointError(f"`{scale}` is {of_scale}; it does not scale the blocks of `{name}` ({shape}).")
