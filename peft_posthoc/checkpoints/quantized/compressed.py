"""compressed-tensors' integers of a few bits, packed into words: its own functions unpack and scale them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.quantized.coded import Coded, Stored
from peft_posthoc.errors import CheckpointError, MissingExtraError
from peft_posthoc.patterns import matched

_PACKED = "weight_packed"
_OWN = ("weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")


def compressed(stored: Stored) -> Iterator[tuple[str, Coded]]:
    """Every weight that lies as words in `X.weight_packed`, as the group of the configuration says that names X.

    Raises:
        CheckpointError: No group of the configuration does.
        MissingExtraError: compressed-tensors is not installed.
    """
    names = [name for name, header in stored.headers.items() if _is_packed(name, header)]
    schemes = _schemes(stored, names) if names else {}
    for name in names:
        scale = stored.beside(name, "weight_scale")
        if scale is None or name not in schemes:
            continue
        told = schemes[name]
        beside = {leaf: own for leaf in _OWN if (own := stored.beside(name, leaf))}
        shape = stored.checkpoint.read(beside["weight_shape"]).tolist() if "weight_shape" in beside else None
        shape = shape or [stored.headers[name].shape[0], stored.headers[name].shape[-1] * 32 // told.weights.num_bits]
        yield (
            f"{name.removesuffix(_PACKED)}weight",
            Coded(
                (name, *beside.values()),
                Header(tuple(shape), stored.dtype),
                partial(_weight, leaves=tuple(beside), shape=tuple(shape), scheme=told, dtype=stored.dtype),
                told.weights.num_bits,
                f"INT{told.weights.num_bits}",
                1,
                stored.all_beside(name, "input_scale", "input_zero_point"),
            ),
        )


def _weight(
    codes: Tensor, *beside: Tensor, leaves: tuple[str, ...], shape: tuple[int, ...], scheme: Any, dtype: torch.dtype
) -> Tensor:
    """The weight of a linear layer, out x in features."""
    from compressed_tensors.compressors import BaseCompressor

    state = {_PACKED: codes, "weight_shape": torch.tensor(shape), **dict(zip(leaves, beside, strict=True))}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    decoded: Tensor = compressor.decompress(state, scheme)["weight"]
    return decoded.to(dtype)


def _is_packed(name: str, header: Header) -> bool:
    return name.rpartition(".")[2] == _PACKED and header.dtype == torch.int32


def _schemes(stored: Stored, names: list[str]) -> dict[str, Any]:
    """By name of packed words, what compressed-tensors has of their group."""
    try:
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError as error:
        raise MissingExtraError(
            f"`{stored.checkpoint.label}` is quantised: reading it needs compressed-tensors: "
            "`pip install 'peft-posthoc[quantised]'`."
        ) from error
    groups = stored.told.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return {}
    found: dict[str, Any] = {}
    modules = {name.removesuffix(f".{_PACKED}"): name for name in names}
    for by_class in (False, True):  # What a group says of names goes before what it says of classes.
        for group in groups.values():
            try:
                scheme = QuantizationScheme.model_validate({"targets": ["Linear"], **group})
            except (TypeError, ValueError) as error:
                raise CheckpointError(
                    f"The quantization_config of `{stored.checkpoint.label}` has a group that the installed "
                    "compressed-tensors does not read. Update it."
                ) from error
            if scheme.weights is None:
                continue
            for module in _named(scheme.targets, modules, by_class=by_class):
                found.setdefault(modules[module], scheme)
    return found


def _named(targets: list[str], modules: Mapping[str, str], *, by_class: bool) -> set[str]:
    """The modules that the targets of a group name: in full, by their ends, or by `re:`; all, if they are a class."""
    if by_class:
        return {*modules} if any(re.fullmatch(r"[A-Z]\w*", target) for target in targets) else set()
    found: set[str] = set()
    for target in targets:
        if target.startswith("re:"):
            found |= matched(target.removeprefix("re:"), modules.keys(), "match")
        else:
            found |= {module for module in modules if module == target or module.endswith(f".{target}")}
    return found
