"""bitsandbytes' weights of 4 and 8 bits, decoded by its own functions, which run on the CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def four_bits(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The weight that codes of 4 bits stand for, in the type that it had.

    Args:
        weight: Codes, two in a byte, however the bytes are stored.
        state: What is stored beside it, without its name: `absmax`, `quant_map`, `quant_state.bitsandbytes__nf4`, ...
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    # A row of codes would be taken for a transposed weight.
    codes = weight.contiguous().view(torch.uint8).reshape(-1, 1)
    told = QuantState.from_dict(dict(state), torch.device("cpu"))
    # As one row: its CPU kernel (0.50, with AVX-512) takes other blocks' scales where a row is no whole number of them.
    shape, told.shape = told.shape, torch.Size([torch.Size(told.shape).numel()])
    decoded: Tensor = dequantize_4bit(codes, told)
    return decoded.reshape(shape)


def said(state: Tensor) -> dict[str, Any]:
    """What a `quant_state` says: `shape`, `dtype`, `blocksize`, ..."""
    read: dict[str, Any] = json.loads(bytes(state.tolist()))
    return read


def eight_bits(weight: Tensor, scales: Tensor) -> Tensor:
    """The weight that int8 stands for, in float32.

    Args:
        weight: Out x in features.
        scales: Of every out feature, the largest absolute value.
    """
    from bitsandbytes.functional import int8_vectorwise_dequant

    decoded: Tensor = int8_vectorwise_dequant(weight, scales)
    return decoded
