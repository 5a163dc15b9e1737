"""bitsandbytes' weights of 4 and 8 bits, decoded by its own functions, which run on the CPU."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.quantized.coded import Coded, Stored
from peft_posthoc.errors import CheckpointError, MissingExtraError

# Beside codes of 4 bits, what they are, as JSON in bytes; it ends in the kind of codes.
_STATE = ".quant_state.bitsandbytes__"


def weights(stored: Stored) -> Iterator[tuple[str, Coded]]:
    """Every weight that is stored so.

    Raises:
        CheckpointError: What lies beside codes does not describe them.
    """
    headers = stored.headers
    states = {name.partition(_STATE)[0]: name for name in headers if _STATE in name}
    beside: dict[str, list[str]] = {weight: [] for weight in states if weight in headers}
    for name in headers:
        # `q_proj.weight.absmax` and its like; the state's own name has one more dot.
        weight = name.partition(_STATE)[0] if _STATE in name else name.rpartition(".")[0]
        if weight in beside:
            beside[weight].append(name)
    for weight, own in beside.items():
        yield weight, _of_four_bits(stored, weight, states[weight], own)
    for name in headers:
        codes, form = stored.beside(name, "weight"), stored.beside(name, "weight_format")
        if name.rpartition(".")[2] == "SCB" and codes is not None:
            sources = (codes, name, *([form] if form else ()))
            header = Header(headers[codes].shape, torch.float32)
            yield codes, Coded(sources, header, partial(_eight_bits, codes), 8, "INT8")


def _of_four_bits(stored: Stored, weight: str, state: str, beside: list[str]) -> Coded:
    try:
        told = said(stored.checkpoint.read(state))
        header = Header(tuple(map(int, told["shape"])), getattr(torch, told["dtype"]))
        count = math.prod(header.shape)
        blocks = -(-count // int(told["blocksize"]))
        held = {"": -(-count // 2), ".absmax": blocks, ".quant_map": 16}
        if "nested_offset" in told:
            held |= {
                ".nested_absmax": -(-blocks // int(told["nested_blocksize"])),
                ".nested_quant_map": 256,
            }
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"`{state}` of `{stored.checkpoint.label}` does not say what its codes are: {error!r}."
        ) from error
    # What is too short its kernels read beyond.
    for leaf, wanted in held.items():
        name = f"{weight}{leaf}"
        found = stored.headers.get(name)
        if found is None or (math.prod(found.shape) if leaf else found.bytes) != wanted:
            raise CheckpointError(
                f"`{stored.checkpoint.label}` holds `{name}` as {found and list(found.shape)}, which does not fit a "
                f"weight of {list(header.shape)} in codes of 4 bits."
            )
    leaves = tuple(name.removeprefix(f"{weight}.") for name in beside)
    kind = state.partition(_STATE)[2].upper()
    return Coded((weight, *beside), header, partial(_four_bits, leaves), 4, kind)


def said(state: Tensor) -> dict[str, Any]:
    """What the state of codes says: `shape`, `dtype`, `blocksize`, ..."""
    read: dict[str, Any] = json.loads(bytes(state.tolist()))
    return read


def four_bits(weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The weight that codes of 4 bits stand for, in the type that it had.

    Args:
        weight: Codes, two in a byte, however the bytes are stored.
        state: What is stored beside it, without its name: `absmax`, `quant_map`, `quant_state.bitsandbytes__nf4`, ...
    """
    functional = _functional()
    told = functional.QuantState.from_dict(dict(state), torch.device("cpu"))
    # As one row: its CPU kernel (0.50, with AVX-512) takes other blocks' scales where a row is no whole number of them.
    shape, told.shape = told.shape, torch.Size([torch.Size(told.shape).numel()])
    # As a column: a row of codes would be taken for a transposed weight.
    decoded: Tensor = functional.dequantize_4bit(_bytes(weight)[:, None], told)
    return decoded.reshape(shape)


def _four_bits(leaves: tuple[str, ...], weight: Tensor, *state: Tensor) -> Tensor:
    return four_bits(weight, dict(zip(leaves, state, strict=True)))


def _bytes(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.uint8).flatten()


def eight_bits(weight: Tensor, scales: Tensor) -> Tensor:
    """The weight that int8 stands for, in float32.

    Args:
        weight: Out x in features.
        scales: Of every out feature, the largest absolute value.
    """
    decoded: Tensor = _functional().int8_vectorwise_dequant(weight, scales)
    return decoded


def _eight_bits(name: str, weight: Tensor, scales: Tensor, form: Tensor | None = None) -> Tensor:
    if form is not None and int(form):
        raise CheckpointError(
            f"`{name}` is stored in an order of bitsandbytes' older kernels ({int(form)}), which is not read. Load the "
            "model and save it again with bitsandbytes 0.45 or later."
        )
    return eight_bits(weight, scales)


def _functional() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise MissingExtraError(
            f"Weights in bitsandbytes' codes need bitsandbytes ({error}): `pip install 'peft-posthoc[quantised]'`."
        ) from error
    return functional
