"""Tensors of an adapter file by their names: which are factors, and which take the place of the base's."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from math import prod
from typing import Any, NamedTuple

from peft_posthoc.adapters.names import PREFIX
from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.errors import AdapterError
from peft_posthoc.models.kinds import EMBEDDING, LINEAR, LayerKind

# `module.lora_A.weight`, or with the adapter's name inside, as a state dict that was not saved by PEFT has it.
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B)(?:\.(?P<adapter>[^.]+))?\.weight")
EMBEDDING_FACTOR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>A|B)(?:\.(?P<adapter>[^.]+))?")
# The modules whose weights PEFT saves unasked, as it thinks that the vocabulary was changed.
_VOCABULARY = ("embed_tokens", "lm_head")


class Factored(NamedTuple):
    """Factors of a module as a file holds them: `b` is m x r, `a` is r x n."""

    kind: LayerKind
    """The one of `FILED` that has such names."""
    a_name: str
    b_name: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Rows of `a`: of stacked experts, those of all."""
        return self.a_shape[0]

    @property
    def m(self) -> int:
        """Out features."""
        return self.b_shape[0]

    @property
    def n(self) -> int:
        """In features, or channels."""
        return self.a_shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """`m` and `n` of the delta; of a convolution, `n` counts the kernel too."""
        return self.m, prod(self.a_shape[1:])


def factored(headers: Mapping[str, Header], label: str) -> dict[str, Factored]:
    """Factors in a file by module, without PEFT's prefix, whatever tool named them.

    Raises:
        AdapterError: Two tensors that are no factors of one matrix are called so.
    """
    found: dict[tuple[str, LayerKind], dict[str, str]] = defaultdict(dict)
    for name in headers:
        for pattern, kind in ((FACTOR, LINEAR), (EMBEDDING_FACTOR, EMBEDDING)):
            if match := pattern.fullmatch(name):
                sides = found[match["module"].removeprefix(PREFIX), kind]
                if match["side"] in sides:
                    raise AdapterError(f"`{label}` holds both `{sides[match['side']]}` and `{name}`.")
                sides[match["side"]] = name
    modules: dict[str, Factored] = {}
    for (module, kind), sides in found.items():
        if len(sides) < 2:
            raise AdapterError(f"`{label}` holds `{next(iter(sides.values()))}` without its counterpart.")
        a, b = headers[sides["A"]], headers[sides["B"]]
        if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
            raise AdapterError(
                f"The factors of `{module}` in `{label}` are {a.dtype} and {b.dtype}, which are no real numbers."
            )
        own = Factored(kind, sides["A"], sides["B"], a.shape, b.shape)
        if len(a.shape) < 2 or len(b.shape) != len(a.shape) or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            raise AdapterError(f"The factors of `{module}` in `{label}` do not fit: {_shapes(own)}{_in_groups(own)}.")
        modules[module] = own
    return modules


def kept_whole(name: str, config: Mapping[str, Any]) -> bool:
    """Tell whether PEFT takes a tensor to belong to one of `modules_to_save`: by the end of a module's name."""
    ends = tuple(config.get("modules_to_save") or ())
    parts = name.removeprefix(PREFIX).split(".")
    return any(".".join(parts[:depth]).endswith(ends) for depth in range(1, len(parts)))


def is_whole(name: str, config: Mapping[str, Any], modules: Collection[str]) -> bool:
    """Tell whether a tensor takes the place of the base's, by what the configuration says or PEFT does unasked.

    It belongs to a module kept whole; or it is what PEFT saves beside factors: embeddings and head, the base's own
    weight of an adapted module, and all biases where the configuration says so. PEFT loads them without asking.

    Args:
        name: The tensor's name in the file.
        config: The adapter's.
        modules: Those with factors.
    """
    module, _, leaf = name.removeprefix(PREFIX).rpartition(".")
    if not name.startswith(PREFIX) or ".lora_" in name:
        return False
    if kept_whole(name, config):
        return True
    if leaf == "bias":
        return bool(config.get("bias", "none") != "none")
    return leaf == "weight" and (
        module.rpartition(".")[2] in _VOCABULARY
        or (module.endswith(".base_layer") and module.removesuffix(".base_layer") in modules)
    )


def _shapes(own: Factored) -> str:
    return f"{list(own.b_shape)} and {list(own.a_shape)}"


def _in_groups(own: Factored) -> str:
    a, b = own.a_shape, own.b_shape
    grouped = len(a) > 2 and len(b) == len(a) and b[1] < a[0]
    return ", a convolution in groups, which is not supported here" if grouped else ""
