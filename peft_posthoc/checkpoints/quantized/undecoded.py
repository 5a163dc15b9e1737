"""Quantised tensors of a checkpoint: codes and scales, whose numbers are not those of the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.errors import CheckpointError

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)
# How the names of codes end, what the weight's own name has in that place, and whose format it is.
_CODES = (
    ("_blocks", "", "MXFP4"),
    (".weight_packed", ".weight", "compressed-tensors"),
    (".qweight", ".weight", "GPTQ or AWQ"),
    (".W_q", ".weight", "HQQ"),
    (".codes", ".weight", "AQLM"),
    (".weight", ".weight", "integers"),
)
_STATE = ".quant_state."
# What lies beside codes in their module.
_BESIDE = re.compile(r"scal(?:e|ing)|zero|g_idx|shape|absmax|quant|codebook|amax|^SCB$|_format$|^meta$", re.IGNORECASE)


class Quantized(NamedTuple):
    """A tensor of a quantised weight, or the weight by its own name."""

    format: str
    weight: str
    """The weight's own name."""
    is_part: bool = False
    """Whether it lies beside the codes: scales, zero points and the like."""


def quantized(checkpoint: Checkpoint) -> dict[str, Quantized]:
    """The quantised tensors of a checkpoint, and the weights that they stand for, by name.

    They are told by types and names: a configuration may say nothing of them, or name a format in which the model is
    only to be loaded. A view that shows decoded weights has none.
    """
    headers = checkpoint.headers
    said = (checkpoint.config or {}).get("quantization_config")
    method = str(said.get("quant_method") or "quantized") if isinstance(said, Mapping) else None
    codes = {name: held for name, header in headers.items() if (held := _codes(name, header, method))}
    found: dict[str, Quantized] = {}
    by_module: dict[str, Quantized] = {}
    for name, (weight, form) in codes.items():
        one = Quantized(method or _by_companions(name, headers) or form, weight)
        found |= {name: one, weight: one}
        by_module[name.rpartition(".")[0]] = one
    for name in headers.keys() - found.keys():
        module, _, leaf = name.rpartition(".")
        beside = not leaf.endswith("bias") and _BESIDE.search(leaf)
        owner = next((found[own] for own in _owners(name) if own in codes), by_module.get(module) if beside else None)
        if owner:
            found[name] = owner._replace(is_part=True)
    return found


def refuse_codes(checkpoint: Checkpoint, why: str, concerns: Callable[[str], bool] = lambda _: True) -> None:
    """See that a checkpoint holds no codes where numbers are needed.

    Args:
        checkpoint: As it is read: what a view decodes are no codes.
        why: What cannot be done with them.
        concerns: Of the names of weights, those for which it matters.

    Raises:
        CheckpointError: It holds some.
    """
    for name, one in quantized(checkpoint).items():
        if concerns(name):
            raise CheckpointError(
                f"`{checkpoint.label}` holds `{name}` quantised ({one.format}), and {why}. Give the model that it was "
                "made from, in 16 bits."
            )


def _codes(name: str, header: Header, method: str | None) -> tuple[str, str] | None:
    """The weight that a tensor holds the codes of, and their format; None if it holds none."""
    if header.dtype.is_floating_point:
        return (name, "float8") if header.dtype.itemsize == 1 else None
    if header.dtype not in _INTEGERS or name.endswith("bias"):
        return None
    if _STATE in name:
        return name.partition(_STATE)[0], "bitsandbytes, 4 bits"  # Whose codes may be stored as any type.
    for end, own, form in _CODES:
        if name.endswith(end):
            return f"{name.removesuffix(end)}{own}", form
    return (name, "integers") if method and not _BESIDE.search(name.rpartition(".")[2]) else None


def _by_companions(name: str, headers: Mapping[str, Header]) -> str | None:
    """The format that the tensors beside codes tell."""
    if f"{name}.absmax" in headers:
        return "bitsandbytes, 4 bits"
    return "bitsandbytes, 8 bits" if f"{name.removesuffix('weight')}SCB" in headers else None


def _owners(name: str) -> Iterator[str]:
    """The names that a tensor's own name goes on after a dot: `q_proj.weight` of `q_proj.weight.absmax`."""
    for at, sign in enumerate(name):
        if sign == ".":
            yield name[:at]
