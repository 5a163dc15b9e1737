"""AWQ: numbers of 4 bits, in the orders of its kernels, and a scale and a zero for each group of in features."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.coded import Coded
from peft_posthoc.checkpoints.grid import unpacked, weight_of
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
    codes = _across(qweight)
    zeros = torch.full_like(scales.T, 8, dtype=torch.uint8) if qzeros is None else _across(qzeros)
    return weight_of(codes, zeros, scales.T, _groups(codes, len(scales)))


def gemv(qweight: Tensor, scales: Tensor, qzeros: Tensor, *, group: int) -> Tensor:
    """The same from words along the in features, in their own order; zeros and scales are filled up with more groups.

    Args:
        qweight: Words of numbers, out features x in features / 8.
        scales: Out features x groups.
        qzeros: Words of zeros, out features x groups / 8.
        group: In features of a group.
    """
    codes = unpacked(qweight, 4)
    count = codes.shape[1] // group
    return weight_of(codes, unpacked(qzeros, 4)[:, :count], scales[:, :count], _groups(codes, count))


def _across(words: Tensor) -> Tensor:
    """The numbers of words along the second side, as that many rows."""
    columns = words.T.contiguous()
    return torch.stack([((columns >> (4 * place)) & 15).to(torch.uint8) for place in _PLACES], 1).flatten(0, 1)


def _groups(codes: Tensor, count: int) -> Tensor:
    return torch.arange(codes.shape[1]) // (codes.shape[1] // count)


def find(checkpoint: Checkpoint) -> dict[str, Coded]:
    """The weights that a checkpoint holds so, by name.

    Raises:
        CheckpointError: They are in a form that is not read.
    """
    config = (checkpoint.config or {}).get("quantization_config") or {}
    if config.get("quant_method") != "awq":
        return {}
    headers = checkpoint.headers
    modules = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
    version, bits = str(config.get("version") or "gemm").lower(), int(config.get("bits") or 4)
    if modules and (version not in ("gemm", "gemv") or bits != 4):
        raise CheckpointError(
            f"`{checkpoint.label}` holds codes of {bits} bits in AWQ's form `{version}`, which are not read; of 4 bits "
            "in `gemm` and `gemv` they are."
        )
    group, found = int(config.get("group_size") or -1), {}
    for module in modules:
        sources = [f"{module}.{part}" for part in ("qweight", "scales", "qzeros")]
        sources = [name for name in sources if name in headers]
        words, scales = headers[sources[0]].shape, headers.get(f"{module}.scales")
        if scales is None:
            continue
        if version == "gemv":
            size = group if group > 0 else 8 * words[1]
            shape, make, steps = (words[0], 8 * words[1]), partial(gemv, group=size), partial(_steps_of_gemv, size)
        else:
            shape, make, steps = (8 * words[1], words[0]), gemm, _steps_of_gemm
        found[f"{module}.weight"] = Coded(tuple(sources), Header(shape, scales.dtype), make, steps)
    return found


def _steps_of_gemm(qweight: Tensor, scales: Tensor, qzeros: Tensor | None = None) -> Tensor:
    return scales.T.repeat_interleave(len(qweight) // len(scales), 1)


def _steps_of_gemv(group: int, qweight: Tensor, scales: Tensor, qzeros: Tensor) -> Tensor:
    return scales[:, : 8 * qweight.shape[1] // group].repeat_interleave(group, 1)
