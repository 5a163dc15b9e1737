"""GPTQ: whole numbers along the in features, and a scale and a zero for each group of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.quantized.coded import Coded, Stored
from peft_posthoc.checkpoints.quantized.grid import unpacked, weight_of, whole
from peft_posthoc.errors import CheckpointError

# What the stored zeros lack, by form of the format.
_LACKING = {"gptq": 1, "gptq_v2": 0}
_BITS = (4, 8, 3, 2)
_PARTS = ("qweight", "scales", "qzeros", "g_idx")


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
    n = len(qweight) * 32 // bits
    groups = torch.arange(n) // group if g_idx is None or not len(g_idx) else g_idx.long()
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    if qzeros is not None:
        # Zero itself is stored as the largest number in the first version. GPTQModel reads it so; kernels made after
        # ExLlama's take it for 2**bits, which no quantiser writes.
        zeros = (unpacked(qzeros, bits)[:, : scales.shape[1]] + offset) & (2**bits - 1)
    words = qweight.T.contiguous()
    return weight_of(lambda rows: whole(words[rows], bits)[:, : len(groups)], zeros.T, scales.T, groups)


def weights(stored: Stored) -> Iterator[tuple[str, Coded]]:
    """Every weight that is stored so: none where no configuration says what the codes are.

    Raises:
        CheckpointError: They are in a form that is not read.
    """
    if stored.method != "gptq":
        return
    form = str(stored.told.get("checkpoint_format") or stored.told.get("format") or "gptq").lower()
    for name in stored.headers:
        if not name.endswith(".qweight"):
            continue
        if form not in _LACKING:
            raise CheckpointError(
                f"`{stored.checkpoint.label}` holds codes in GPTQ's form `{form}`, which is not read; `gptq` and "
                "`gptq_v2` are."
            )
        module = name.removesuffix(".qweight")
        parts = [part for part in _PARTS if f"{module}.{part}" in stored.headers]
        if "scales" in parts:
            yield f"{module}.weight", _layer(stored, module, parts, _LACKING[form])


def _layer(stored: Stored, module: str, parts: list[str], offset: int) -> Coded:
    headers = {part: stored.headers[f"{module}.{part}"] for part in parts}
    shapes = {part: header.shape for part, header in headers.items()}
    where = f"`{module}` of `{stored.checkpoint.label}`"
    sides = {part: len(shape) for part, shape in shapes.items()}
    if sides != {part: 1 if part == "g_idx" else 2 for part in parts} or 0 in shapes["scales"]:
        raise CheckpointError(f"{where} is no linear layer in GPTQ's codes: {shapes}.")
    count, out = shapes["scales"]
    bits = _bits(shapes, stored.number("bits"))
    if bits not in _BITS:
        raise CheckpointError(
            f"{where} is in GPTQ's codes of {bits} bits, which are not read; of 2, 3, 4 and 8 they are."
        )
    most = shapes["qweight"][0] * 32 // bits
    n = shapes.get("g_idx", (0,))[0] or most
    if n > most or shapes["qweight"][1] != out or shapes.get("qzeros", (count,))[0] != count:
        raise CheckpointError(f"{where} is no linear layer in GPTQ's codes of {bits} bits: {shapes}.")
    group = stored.number("group_size")
    how = {"bits": bits, "offset": offset, "group": group if group > 0 else -(-n // count)}
    return Coded(
        tuple(f"{module}.{part}" for part in parts),
        Header((out, n), headers["scales"].dtype),
        partial(_made, parts, **how),
        bits,
        f"INT{bits}",
    )


def _bits(shapes: Mapping[str, tuple[int, ...]], asked: int) -> int:
    """The bits that are asked for, or that a layer has in their place: GPTQModel may give some layers others."""
    out, n = shapes["scales"][1], shapes.get("g_idx", (0,))[0]
    words = [(out, shapes["qzeros"][1])] if "qzeros" in shapes else []
    words += [(n, shapes["qweight"][0])] if n else []
    return next((b for b in (asked, *_BITS) if words and all(_words(count, b) == held for count, held in words)), asked)


def _words(count: int, bits: int) -> int:
    """How many words hold so many numbers; of 3 bits, three words hold 32."""
    return -(-count // 32) * 3 if bits == 3 else -(-count * bits // 32)


def _made(parts: list[str], *tensors: Tensor, bits: int, offset: int, group: int) -> Tensor:
    found = dict(zip(parts, tensors, strict=True))
    zeros, groups = found.get("qzeros"), found.get("g_idx")
    return gptq(found["qweight"], found["scales"], zeros, groups, bits=bits, offset=offset, group=group)
