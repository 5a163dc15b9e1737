"""Weights of 8-bit floats or integers, and a scale for each weight, row or block of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.quantized.coded import Coded, Stored
from peft_posthoc.errors import CheckpointError

_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
# Of activations, which stay as they are.
_OF_INPUTS = ("input_scale", "scale_input", "activation_scale", "input_global_scale", "input_zero_point")


def scaled(stored: Stored) -> Iterator[tuple[str, Coded]]:
    """Every weight of 8 bits that has its scale beside it.

    The scale is `X.weight_scale_inv` (DeepSeek, Qwen; a factor all the same), `X.weight_scale` (compressed-tensors,
    ModelOpt, ComfyUI) or `X.scale_weight` (ComfyUI's older files).
    """
    for name, header in stored.headers.items():
        leaf = name.rpartition(".")[2]
        is_float = header.dtype in _FLOATS
        # Where 8-bit floats are told, a byte is two of 4 bits.
        if not is_float and (header.dtype != torch.int8 or stored.method == "fp8"):
            continue
        scale = stored.beside(name, f"{leaf}_scale_inv", f"{leaf}_scale", f"scale_{leaf}")
        if scale is None:
            continue
        by = _by(name, header.shape, scale, stored.headers[scale].shape)
        zero = None if is_float else stored.beside(name, f"{leaf}_zero_point")
        yield (
            name,
            Coded(
                (name, scale, *([zero] if zero else [])),
                Header(header.shape, stored.dtype),
                partial(weight, dtype=stored.dtype),
                8,
                f"{'FP8' if is_float else 'INT8'}{by}",
                beside=stored.all_beside(name, *_OF_INPUTS),
            ),
        )


def weight(codes: Tensor, scale: Tensor, zero: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """(codes - zero) * scale, computed in float32 and rounded once."""
    values = codes.float()
    if zero is not None:
        values -= spread(zero.float(), values.shape)
    return values.mul_(spread(factor(scale), values.shape)).to(dtype)


def factor(scale: Tensor) -> Tensor:
    """A scale as float32; bytes are exponents of two (ue8m0)."""
    return scale.float().sub_(127).exp2_() if scale.dtype == torch.uint8 else scale.float()


def spread(told: Tensor, shape: torch.Size) -> Tensor:
    """What is told of a weight, its rows or its blocks, so that it broadcasts to its values."""
    if told.numel() == 1:
        return told.reshape(())
    if told.ndim == 1:
        return told.reshape(-1, *[1] * (len(shape) - 1))
    for side in (-2, -1):
        if told.shape[side] not in (1, shape[side]):
            block = -(-shape[side] // told.shape[side])
            told = told.repeat_interleave(block, side).narrow(side, 0, shape[side])
    return told


def _by(name: str, shape: tuple[int, ...], scale: str, of_scale: tuple[int, ...]) -> str:
    """What the scale is for: a weight, its rows, or blocks of it.

    Raises:
        CheckpointError: It is for none of these.
    """
    if torch.Size(of_scale).numel() == 1:
        return ""
    if of_scale in ((shape[0],), (shape[0], *[1] * (len(shape) - 1))):
        return " by row"
    if len(of_scale) == len(shape) >= 2 and shape[:-2] == of_scale[:-2]:
        blocks = [-(-m // max(k, 1)) for m, k in zip(shape[-2:], of_scale[-2:], strict=True)]
        if all(b and -(-m // b) == k for m, k, b in zip(shape[-2:], of_scale[-2:], blocks, strict=True)):
            return " by block"
    raise CheckpointError(f"`{scale}` is {of_scale}; it scales neither `{name}` ({shape}) nor its rows or blocks.")
