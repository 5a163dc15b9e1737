"""ComfyUI's files where they differ from others: scales in a kernel's order of tiles, and weights that are turned."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.quantized import fp4, scaled
from peft_posthoc.checkpoints.quantized.coded import Coded, Stored
from peft_posthoc.errors import CheckpointError

# These are read as everywhere.
_PLAIN = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_blockwise")
# In features that share a scale.
_GROUPS = {"nvfp4": 16, "mxfp8": 32}


def weights(stored: Stored) -> Iterator[tuple[str, Coded]]:
    """Every weight in NVFP4 or MXFP8.

    Raises:
        CheckpointError: A weight is in a form that is not read.
    """
    for name, header in stored.headers.items():
        if header.dtype.itemsize > 1 or name.rpartition(".")[2] != "weight":
            continue
        layer = stored.layer(name)
        if layer is None:
            continue
        form, inner = layer.get("format"), layer.get("params")
        turned = layer.get("convrot") or (isinstance(inner, dict) and inner.get("convrot"))
        if turned or form not in (*_PLAIN, *_GROUPS):
            how = f"{form}, rotated" if turned else form
            raise CheckpointError(
                f"`{stored.checkpoint.label}` holds `{name}` in ComfyUI's form `{how}`, which is not read. Give the "
                "model that it was made from."
            )
        if form in _GROUPS:
            yield name, _matrix(stored, name, str(form))


def _matrix(stored: Stored, name: str, form: str) -> Coded:
    leaves = ("weight_scale", "weight_scale_2") if form == "nvfp4" else ("weight_scale",)
    scales = [own for leaf in leaves if (own := stored.beside(name, leaf))]
    shape = stored.headers[name].shape
    rows, columns = shape[0], shape[-1] * (2 if form == "nvfp4" else 1)
    groups = columns // _GROUPS[form]
    room = (-(-rows // 128) * 128) * (-(-groups // 4) * 4)
    held = [torch.Size(stored.headers[own].shape).numel() for own in scales]
    if len(shape) != 2 or held != [room, 1][: len(leaves)]:
        raise CheckpointError(
            f"`{stored.checkpoint.label}` holds `{name}` as {list(shape)} in {form.upper()}, and of its scales "
            f"{dict(zip(scales, held, strict=True))}; they would be {dict(zip(leaves, (room, 1), strict=False))}."
        )
    make = _nvfp4 if form == "nvfp4" else _mxfp8
    return Coded(
        (name, *scales),
        Header((rows, columns), stored.dtype),
        partial(make, dtype=stored.dtype),
        4 if form == "nvfp4" else 8,
        form.upper(),
        beside=stored.all_beside(name, "input_scale", "comfy_quant"),
    )


def in_rows(tiles: Tensor, rows: int, groups: int) -> Tensor:
    """Scales by rows and groups, of cuBLAS' tiles of 128 rows and 4 groups: in a tile, rows 32 apart lie together."""
    down, across = -(-rows // 128), -(-groups // 4)
    tiled = tiles.reshape(down, across, 32, 4, 4)
    return tiled.permute(0, 3, 2, 1, 4).reshape(down * 128, across * 4)[:rows, :groups]


def _nvfp4(codes: Tensor, scale: Tensor, second: Tensor, *, dtype: torch.dtype) -> Tensor:
    scales = in_rows(scale.view(torch.uint8), len(codes), codes.shape[1] // 8).view(torch.float8_e4m3fn)
    return fp4.matrix(codes, scales, second, dtype=dtype, high_first=True)


def _mxfp8(codes: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    rows, columns = codes.shape
    scales = in_rows(scale.view(torch.uint8), rows, columns // 32)
    blocks = scaled.Blocks((1, rows, columns), (1, rows, columns // 32), (1, 32))
    return scaled.weight(codes, scales, blocks=blocks, dtype=dtype)
