"""The header of a safetensors file: known from names, types and shapes, before there is a tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from peft_posthoc.checkpoints.checkpoint import Header

TYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""By type, its name in safetensors, in the order in which tensors are put into a file; those of one type go by name."""


def header_bytes(tensors: Mapping[str, Header], metadata: Mapping[str, str]) -> int:
    """The bytes of a file before its numbers.

    Args:
        tensors: Those that are in the file, by name.
        metadata: The file's.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    places, end = list(TYPES), 0
    for name in sorted(tensors, key=lambda name: (places.index(tensors[name].dtype), name)):
        header = tensors[name]
        start, end = end, end + header.bytes
        entries[name] = {"dtype": TYPES[header.dtype], "shape": header.shape, "data_offsets": [start, end]}
    length = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8
