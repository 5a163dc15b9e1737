"""compressed-tensors' packed whole numbers, and a scale for each row or group of in features."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.quantized.coded import Coded, Stored
from peft_posthoc.checkpoints.quantized.grid import unpacked, weight_of, whole
from peft_posthoc.errors import CheckpointError

_BITS = (4, 8, 2, 3, 5, 6, 7)


def weights(stored: Stored) -> Iterator[tuple[str, Coded]]:
    """Every weight that is stored as `X.weight_packed` of words."""
    for name, header in stored.headers.items():
        if not name.endswith(".weight_packed") or header.dtype is not torch.int32 or len(header.shape) != 2:
            continue
        scale = stored.beside(name, "weight_scale")
        if scale is None:
            continue
        zero, groups, shape = (
            stored.beside(name, leaf) for leaf in ("weight_zero_point", "weight_g_idx", "weight_shape")
        )
        of_scale = stored.headers[scale]
        count = of_scale.shape[1] if len(of_scale.shape) == 2 else 1
        n, bits = _columns(stored, header.shape[1], count, shape)
        make = partial(_made, n=n, bits=bits, has=(zero is not None, groups is not None), dtype=stored.dtype)
        yield (
            f"{name.removesuffix('_packed')}",
            Coded(
                (name, scale, *filter(None, (zero, groups))),
                Header((header.shape[0], n), stored.dtype),
                make,
                bits,
                f"INT{bits}",
                along=1,
                beside=(*filter(None, (shape,)), *stored.all_beside(name, "input_scale", "input_zero_point")),
            ),
        )


def _columns(stored: Stored, words: int, count: int, shape: str | None) -> tuple[int, int]:
    """The in features of a weight, and the bits of a number.

    The shape is read where that takes no download; otherwise the configuration tells.

    Raises:
        CheckpointError: No numbers of a known size fill the words.
    """
    told = stored.schemes
    asked = [int(one.get("num_bits") or 0) for one in told]
    if shape is not None and not stored.checkpoint.to_fetch:
        sides = [int(stored.checkpoint.read(shape)[-1])]
    else:
        sides = [count * int(one.get("group_size") or 0) for one in told if count > 1]
        sides += [words * 32 // bits for bits in asked if bits]
    for n in sides:
        for bits in (*asked, *_BITS):
            if bits and -(-n * bits // 32) == words:
                return n, bits
    raise CheckpointError(
        f"`{stored.checkpoint.label}` holds words of compressed-tensors that numbers of no size fill: its "
        "`quantization_config` and `weight_shape` do not fit them."
    )


def _made(
    words: Tensor, scale: Tensor, *beside: Tensor, n: int, bits: int, has: tuple[bool, bool], dtype: torch.dtype
) -> Tensor:
    m = len(words)
    scales = scale.reshape(-1, scale.shape[-1] if scale.ndim > 1 else 1).expand(m, -1)
    zeros = torch.full((1, 1), 2 ** (bits - 1)).expand_as(scales)
    if has[0]:
        # Packed along the out features.
        zeros = unpacked(beside[0].T, bits)[:, :m].T
    groups = beside[-1].long() if has[1] else torch.arange(n) // -(-n // scales.shape[1])
    return weight_of(lambda rows: whole(words[rows], bits)[:, :n], zeros, scales, groups).to(dtype)
