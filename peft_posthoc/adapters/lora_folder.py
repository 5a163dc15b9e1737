"""Any PEFT LoRA folder, read one module at a time: its factors with their scale folded in, and what else it holds."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_posthoc.adapters.config import by_pattern, read_config
from peft_posthoc.adapters.peft_format import PREFIX, WEIGHTS
from peft_posthoc.adapters.plain import not_plain
from peft_posthoc.errors import AdapterError
from peft_posthoc.files import regular

_KEYS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
_BIAS = "lora_B.bias"

Kind = Literal["linear", "embedding", "convolution", "experts"]


class Factors(NamedTuple):
    """The factors of one delta, the scale folded into `b`, in float64."""

    a: Float[Tensor, "r n"]
    b: Float[Tensor, "m r"]


@dataclass(frozen=True)
class Module:
    """What an adapter file says of one module that has factors."""

    name: str
    """PEFT's, without the prefix."""
    kind: Kind
    rank: int
    scale: float
    """What PEFT multiplies the product with."""
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    experts: int = 1
    """How many deltas are stacked in it."""
    bias: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """`m` and `n` of each delta; of a convolution, `n` counts the kernel too."""
        return self.b_shape[0], math.prod(self.a_shape[1:])

    def tensor_names(self) -> tuple[str, str]:
        """What its factors are called in the file."""
        a = "lora_embedding_A" if self.kind == "embedding" else "lora_A.weight"
        return f"{PREFIX}{self.name}.{a}", f"{PREFIX}{self.name}.{_KEYS[a]}"

    def split(self, a: Tensor, b: Tensor) -> list[Factors]:
        """The matrices of each delta, out of the file's tensors: views."""
        if self.kind != "experts":
            return [Factors(a.reshape(len(a), -1), b.reshape(len(b), -1))]
        # PEFT's `ParamWrapper`: rows of A by expert and then rank, columns of B by rank and then expert.
        stacked = b.reshape(len(b), -1, self.experts)
        each = a.reshape(self.experts, -1, a.shape[1])
        return [Factors(each[e], stacked[:, :, e]) for e in range(self.experts)]

    def join(self, parts: list[Factors]) -> dict[str, Tensor]:
        """The file's tensors, out of the matrices of each delta, all of one rank."""
        a_key, b_key = self.tensor_names()
        if self.kind == "experts":
            a, b = torch.cat([one.a for one in parts]), torch.stack([one.b for one in parts], dim=-1).flatten(1)
        else:
            ((a, b),) = parts
        kernel = self.a_shape[2:]
        return {
            a_key: a.reshape(len(a), *self.a_shape[1:]).contiguous(),
            b_key: b.reshape(*b.shape, *(1 for _ in kernel)).contiguous(),
        }


class LoraFolder:
    """A PEFT LoRA folder; its tensors stay on disk until they are asked for.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        AdapterError: It cannot be read, or what it adds to the weights is not the product of its factors alone.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.label = str(folder)
        self.place = Path(folder).absolute()
        where = Path(folder)
        if not (where / WEIGHTS).exists() and (where / "adapter_model.bin").is_file():
            raise AdapterError(
                f"`{where}` holds a pickle, `adapter_model.bin`, which is not executed here. Load it with PEFT where "
                "you trust it, and save it again: that writes safetensors."
            )
        self._open = ExitStack()
        try:
            self.config: Mapping[str, Any] = read_config(where)
            self._file = self._open.enter_context(safe_open(regular(where / WEIGHTS), framework="pt"))
            self._names = list(self._file.keys())
            shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._names}
            why = not_plain(self.config)
            if why is None and self.config.get("bias", "none") != "none":
                why = f"its configuration sets `bias` to {self.config['bias']!r}: it replaces biases of the base"
            if why is not None:
                raise AdapterError(f"`{where}` is no plain LoRA delta: {why}.")
            self.modules = {module.name: module for module in _modules(shapes, self.config, where)}
            for key in (key for module in self.modules.values() for key in module.tensor_names()):
                if not (code := self._file.get_slice(key).get_dtype()).startswith(("F", "BF")):
                    raise AdapterError(f"The adapter holds `{key}` as {code}, which are no real numbers.")
        except AdapterError as error:
            self.close()
            raise AdapterError(str(error).replace("The adapter ", f"`{where}` ", 1)) from error
        except (OSError, ValueError, SafetensorError, KeyError) as error:
            self.close()
            raise AdapterError(f"`{where}` is not a readable LoRA adapter: {_told(error)}.") from error
        taken = {key for module in self.modules.values() for key in module.tensor_names()}
        taken |= {f"{PREFIX}{module.name}.{_BIAS}" for module in self.modules.values() if module.bias}
        self.whole = tuple(name for name in self._names if name not in taken)
        """The file's names of the tensors that take the place of the base's."""
        strangers = [name for name in self.whole if not self._is_whole(name)]
        if strangers or not self.modules:
            self.close()
            what = f"tensors that are no LoRA factors: {', '.join(strangers[:5])}" if strangers else "no LoRA factors"
            raise AdapterError(f"`{where}` holds {what}.")

    def __enter__(self) -> LoraFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._open.close()

    def factors(self, module: str) -> list[Factors]:
        """The factors of each of a module's deltas, their scale folded into `b`, in float64."""
        found = self.modules[module]
        a, b = (self._file.get_tensor(key).double() for key in found.tensor_names())
        return [Factors(one.a, one.b * found.scale) for one in found.split(a, b)]

    def bias(self, module: str) -> Tensor | None:
        """What is added to a module's bias, the scale folded in, in float64; None where LoRA has none."""
        if not self.modules[module].bias:
            return None
        values: Tensor = self._file.get_tensor(f"{PREFIX}{module}.{_BIAS}").double()
        return values * self.modules[module].scale

    def tensor(self, name: str) -> Tensor:
        """One tensor of the file, as it is."""
        found: Tensor = self._file.get_tensor(name)
        return found

    def dtype(self) -> torch.dtype:
        """Of the factors: the widest."""
        dtypes = {self._file.get_slice(module.tensor_names()[0]).get_dtype() for module in self.modules.values()}
        names = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        found = [names.get(name, torch.bfloat16) for name in sorted(dtypes)]
        for dtype in found[1:]:
            found[0] = torch.promote_types(found[0], dtype)
        return found[0]

    def bytes(self) -> int:
        """What its tensors take."""
        return sum(self.bytes_of(name) for name in self._names)

    def bytes_of(self, name: str) -> int:
        """What one tensor takes."""
        part = self._file.get_slice(name)
        bits = int(re.sub(r"\D", "", str(part.get_dtype()).partition("_")[0]) or 8)
        return math.prod(map(int, part.get_shape())) * bits // 8

    def _is_whole(self, name: str) -> bool:
        """Whether it is in a module kept whole, or the base's own weight of an adapted embedding or head."""
        inner = name.removeprefix(PREFIX)
        if inner.removesuffix(".base_layer.weight") in self.modules:
            return True
        ends = tuple(self.config.get("modules_to_save") or ())
        parts = inner.split(".")
        return any(".".join(parts[:depth]).endswith(ends) for depth in range(1, len(parts)))


def _modules(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], where: Path) -> Iterator[Module]:
    keys = {name: key for name in shapes for key in _KEYS if name.endswith(f".{key}") and name.startswith(PREFIX)}
    modules = {name: name.removesuffix(key).removeprefix(PREFIX).removesuffix(".") for name, key in keys.items()}
    parameters_of = {module: _parameters(module, config) for module in modules.values()}
    scaled = _scaled([one for module, own in parameters_of.items() for one in own or [module]], config, where)
    for name, key in keys.items():
        a_shape, module, stem = shapes[name], modules[name], name.removesuffix(key)
        if f"{stem}{_KEYS[key]}" not in shapes:
            raise AdapterError(f"The adapter holds `{name}` without `{stem}{_KEYS[key]}`.")
        b_shape = shapes[f"{stem}{_KEYS[key]}"]
        parameters = parameters_of[module]
        wanted = {scaled[one] for one in parameters or [module]}
        if len(wanted) > 1:
            raise AdapterError(
                f"The adapter gives the parameters of `{module}` different ranks or scales by a pattern; which of its "
                "tensors belong to which only the model can tell."
            )
        ((rank, scale),) = wanted
        kind, experts = _kind(key, a_shape, parameters), 1
        if kind == "experts":
            experts = a_shape[0] // rank
        if (
            len(a_shape) < 2
            or 0 in (experts, *a_shape, *b_shape)
            or a_shape[0] != rank * experts
            or b_shape[1:] != (a_shape[0], *(1 for _ in a_shape[2:]))
        ):
            grouped = len(a_shape) > 2 and len(b_shape) == len(a_shape) and b_shape[1] < a_shape[0]
            raise AdapterError(
                f"The adapter holds factors of shapes {list(a_shape)} and {list(b_shape)} for `{module}`, "
                + ("a convolution in groups, which is not supported here." if grouped else f"and not of rank {rank}.")
            )
        yield Module(module, kind, rank, scale, a_shape, b_shape, experts, f"{stem}{_BIAS}" in shapes)


def _kind(key: str, a_shape: tuple[int, ...], parameters: list[str]) -> Kind:
    if key == "lora_embedding_A":
        return "embedding"
    if parameters:
        return "experts"
    return "convolution" if len(a_shape) > 2 else "linear"


def _parameters(module: str, config: Mapping[str, Any]) -> list[str]:
    """The parameters that a module's factors may be for (`target_parameters`), by their full names."""
    owner = module.replace(".base_layer", "")
    found = [str(target).rpartition(".") for target in config.get("target_parameters") or ()]
    return [f"{owner}.{leaf}" for parent, _, leaf in found if owner == parent or owner.endswith(f".{parent}")]


def _scaled(names: Sequence[str], config: Mapping[str, Any], where: Path) -> dict[str, tuple[int, float]]:
    """By module or parameter, its rank, and what PEFT multiplies its factors with."""
    ranks, alphas = (by_pattern(config, key, names, where) for key in ("rank_pattern", "alpha_pattern"))
    found = {}
    for name in names:
        rank, alpha = ranks.get(name, config["r"]), float(alphas.get(name, config["lora_alpha"]))
        found[name] = rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return found


def _told(error: BaseException) -> str:
    return f"its configuration has no {error}" if isinstance(error, KeyError) else str(error)
