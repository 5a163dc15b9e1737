"""AWQ: numbers of 4 bits, in the orders of its kernels, and a scale and a zero for each group of in features."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.quantized.coded import Coded, Stored
from peft_posthoc.checkpoints.quantized.grid import eight_rows, unpacked, weight_of, whole
from peft_posthoc.errors import CheckpointError

# Where a word has each of eight neighbours: a kernel gets 0 and 1, then 2 and 3, from the halves of a word at once.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def gemm(qweight: Tensor, scales: Tensor, qzeros: Tensor | None = None) -> Tensor:
    """The weight of a linear layer, out x in features, from words along the out features.

    Args:
        qweight: Words of numbers, in features x out features / 8.
        scales: Groups x out features.
        qzeros: Words of zeros, groups x out features / 8; None where all are the middle.
    """
    zeros = torch.full_like(scales.T, 8) if qzeros is None else eight_rows(qzeros.T, _PLACES)
    groups = _groups(len(qweight), len(scales))
    words = qweight.T.contiguous()

    def codes(rows: slice) -> Tensor:
        return eight_rows(words[rows.start // 8 : rows.stop // 8], _PLACES).float()

    return weight_of(codes, zeros, scales.T, groups, every=8)


def gemv(qweight: Tensor, scales: Tensor, qzeros: Tensor, *, group: int) -> Tensor:
    """The same from words along the in features, in their own order; zeros and scales are filled up with more groups.

    Args:
        qweight: Words of numbers, out features x in features / 8.
        scales: Out features x groups.
        qzeros: Words of zeros, out features x groups / 8.
        group: In features of a group.
    """
    n = 8 * qweight.shape[1]
    count = n // group
    zeros = unpacked(qzeros, 4)[:, :count]
    return weight_of(lambda rows: whole(qweight[rows], 4), zeros, scales[:, :count], _groups(n, count))


def _groups(n: int, count: int) -> Tensor:
    return torch.arange(n) // (n // count)


def weights(stored: Stored) -> Iterator[tuple[str, Coded]]:
    """Every weight that is stored so.

    Raises:
        CheckpointError: They are in a form that is not read.
    """
    if stored.method != "awq":
        return
    version = str(stored.told.get("version") or stored.told.get("format") or "gemm").lower()
    bits = stored.number("bits") or 4
    for name in stored.headers:
        scales = stored.beside(name, "scales")
        if not name.endswith(".qweight") or scales is None:
            continue
        if version not in ("gemm", "gemv") or bits != 4:
            raise CheckpointError(
                f"`{stored.checkpoint.label}` holds codes of {bits} bits in AWQ's form `{version}`, which are not "
                "read; of 4 bits in `gemm` and `gemv` they are."
            )
        yield f"{name.removesuffix('.qweight')}.weight", _layer(stored, name, scales, across=version == "gemm")


def _layer(stored: Stored, words: str, scales: str, *, across: bool) -> Coded:
    zeros, shape, of_scales = stored.beside(words, "qzeros"), stored.headers[words].shape, stored.headers[scales].shape
    fits = len(shape) == len(of_scales) == 2 and 0 not in (*shape, *of_scales)
    group = stored.number("group_size")
    group = group if group > 0 or not fits else 8 * shape[1]
    if across:
        fits = fits and 8 * shape[1] == of_scales[1] and shape[0] % of_scales[0] == 0
    else:
        fits = fits and shape[0] == of_scales[0] and 8 * shape[1] % group == 0 and zeros is not None
    if not fits:
        raise CheckpointError(
            f"`{words}` of `{stored.checkpoint.label}` is {shape}, and `{scales}` {of_scales}: they fit no linear "
            "layer in AWQ's codes."
        )
    header = Header((8 * shape[1], shape[0]) if across else (shape[0], 8 * shape[1]), stored.headers[scales].dtype)
    sources = (words, scales, *([zeros] if zeros else ()))
    return Coded(sources, header, gemm if across else partial(gemv, group=group), 4, "INT4")
