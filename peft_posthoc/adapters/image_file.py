"""LoRA files of image and video models (diffusers, ComfyUI, kohya's scripts), seen as PEFT's own."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import widest
from peft_posthoc.adapters.config import adapter_config
from peft_posthoc.adapters.image_metadata import config_in
from peft_posthoc.adapters.image_names import Named, read_name
from peft_posthoc.adapters.module import Kind, Module
from peft_posthoc.adapters.names import PREFIX, patterns
from peft_posthoc.adapters.plain import not_plain
from peft_posthoc.adapters.reader import LoraFolder
from peft_posthoc.adapters.scale import settings
from peft_posthoc.adapters.tensors import factored
from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.folder import File
from peft_posthoc.checkpoints.view import Piece, View, same
from peft_posthoc.errors import AdapterError, CheckpointError

_OTHERS = {
    "hada_": "LoHa, whose deltas are products of two matrices element by element",
    "lokr_": "LoKr, whose deltas are Kronecker products",
    "oft_": "OFT, which turns the base's weights",
    "dora_scale": "DoRA, which also rescales the base's weights",
    "lora_magnitude_vector": "DoRA, which also rescales the base's weights",
}


class ImageFile(LoraFolder):
    """One component's LoRA in a single file; a scale that is not said is one.

    Args:
        path: The file.
        component: One of those in it; None for the only one.

    Raises:
        AdapterError: It cannot be read, has several components, or is more than factors, differences and whole weights.
    """

    def __init__(self, path: Path, component: str | None = None) -> None:
        self.label = str(path) if component is None else f"{path}:{component}"
        self.place, self.files = path.absolute().parent, (path,)
        try:
            file = File(path, label=self.label)
        except CheckpointError as error:
            raise AdapterError(f"`{path}` is not a readable LoRA file: {str(error).removesuffix('.')}.") from error
        self._own = file
        by_component = _sorted(file, self.label)
        if component not in (by_component if component else (None,)):
            raise AdapterError(f"`{path}` has nothing for `{component}`; it has {', '.join(by_component)}.")
        if component is None and len(by_component) > 1:
            raise AdapterError(
                f"`{path}` is for several components of a pipeline. Give one of them: "
                f"{', '.join(f'`{path}:{one}`' for one in by_component)}."
            )
        self.component = component or next(iter(by_component))
        self._tensors = by_component[self.component]
        self._added: dict[str, str] = {}
        self.added = self._added
        pieces = dict(self._pieces())
        self._file = View(file, pieces)
        self.config: Mapping[str, Any] = self._config()
        self._sort()

    def _pieces(self) -> Iterator[tuple[str, Piece]]:
        """The tensors by PEFT's names, and in `added` what is added to the model's own by no factors."""
        for modules, parts in self._tensors.items():
            missing = {"up", "down"} & parts.keys()
            if len(missing) == 1:
                raise AdapterError(f"`{self.label}` holds `{parts[missing.pop()]}` without its counterpart.")
            total, at = self._rows(modules, parts), 0
            for module in modules:
                rows = slice(at, at + total // len(modules)) if module != modules[-1] else slice(at, total)
                if modules[-1].endswith("proj_mlp"):  # Flux: q, k, v and the larger part of the MLP.
                    rows = _of_linear1(self._hidden(parts), modules.index(module), total)
                at = rows.stop
                yield from self._of_module(module, parts, rows if len(modules) > 1 else None)

    def _of_module(self, module: str, parts: Mapping[str, str], rows: slice | None) -> Iterator[tuple[str, Piece]]:
        own = f"{PREFIX}{module}"
        if "down" in parts:
            yield f"{own}.lora_A.weight", self._down(parts)
            yield f"{own}.lora_B.weight", self._cut(parts["up"], rows)
        if "bias" in parts:
            yield f"{own}.lora_B.bias", self._cut(parts["bias"], rows)
        if "set_weight" in parts:
            yield f"{own}.weight", self._cut(parts["set_weight"], rows)
        for part, leaf in (("diff", "weight"), ("diff_b", "bias")):
            if part in parts:
                self._added[f"{module}.{leaf}"] = key = f"{own}.{part}"
                yield key, self._cut(parts[part], rows)

    def _down(self, parts: Mapping[str, str]) -> Piece:
        if "mid" not in parts:
            return same(self._own, parts["down"])
        mid, down = (self._own.headers[parts[part]] for part in ("mid", "down"))
        header = Header((mid.shape[0], down.shape[1], *mid.shape[2:]), torch.float32)
        return Piece((parts["mid"], parts["down"]), header, _tucker)

    def _cut(self, name: str, rows: slice | None) -> Piece:
        if rows is None:
            return same(self._own, name)
        header = self._own.headers[name]
        return Piece(
            (name,), Header((rows.stop - rows.start, *header.shape[1:]), header.dtype), lambda tensor: tensor[rows]
        )

    def _rows(self, modules: tuple[str, ...], parts: Mapping[str, str]) -> int:
        shapes = [self._own.headers[parts[part]].shape for part in parts if part not in ("down", "mid", "alpha")]
        total = shapes[0][0] if shapes and shapes[0] else 0
        if total % len(modules) and not modules[-1].endswith("proj_mlp"):
            raise AdapterError(f"`{self.label}` holds {total} rows for the {len(modules)} parts {', '.join(modules)}.")
        return total

    def _hidden(self, parts: Mapping[str, str]) -> int:
        """In features of Flux's fused layer, which q, k and v have as many rows of."""
        told = next((parts[part] for part in ("down", "diff", "set_weight") if part in parts), None)
        if told is None:
            raise AdapterError(f"`{self.label}` holds `{next(iter(parts.values()))}` alone: its parts are not known.")
        return self._own.headers[told].shape[1]

    def _modules(self) -> Iterator[Module]:
        biased = {name.removeprefix(PREFIX) for name in self.headers}
        found = factored(self.headers, self.label)
        told = config_in(self._own.metadata, self.component)
        if told and (why := not_plain(told)) is not None:
            raise AdapterError(f"`{self.label}` is no plain LoRA delta: {why}.")
        scales = {name: one.scale for name, one in settings(told, found, self.label).items()} if told else {}
        by_module = {module: parts for modules, parts in self._tensors.items() for module in modules}
        for module, own in found.items():
            kind: Kind = "convolution" if len(own.a_shape) > 2 else "linear"
            scale = scales.get(module, 1.0)
            if alpha := by_module[module].get("alpha"):
                scale = self._number(alpha) / own.rank
            yield Module(module, kind, own.rank, scale, own, 1, f"{module}.lora_B.bias" in biased)

    def _number(self, name: str) -> float:
        value = self._own.read(name)
        if value.numel() != 1 or not math.isfinite(number := float(value)):
            raise AdapterError(f"`{self.label}` holds `{name}` as {list(value.shape)}, which is no finite number.")
        return number

    def _sort(self) -> None:
        self.headers = self._file.headers
        self.modules = {module.name: module for module in self._modules()}
        taken = {key for module in self.modules.values() for key in module.tensor_names()}
        taken |= {module.bias_name for module in self.modules.values() if module.bias} | {*self.added.values()}
        self.whole = tuple(name for name in self.headers if name not in taken)
        ranks = {name: module.rank for name, module in self.modules.items() if module.rank != self.config["r"]}
        alphas = {name: module.rank * module.scale for name, module in self.modules.items() if module.scale != 1}
        by_rank = patterns(ranks, self.modules)
        named = dict(zip(ranks, by_rank, strict=True)) | {
            name: next(iter(patterns({name: 1}, self.modules))) for name in alphas
        }
        self.config = {
            **self.config,
            "rank_pattern": by_rank,
            "alpha_pattern": {own: alphas.get(name, ranks.get(name)) for name, own in named.items()},
        }

    def dtype(self) -> torch.dtype:
        """The widest type of the factors, or of all where there are none."""
        names = [parts[part] for parts in self._tensors.values() for part in ("down", "up") if part in parts]
        return widest(self._own.headers[name].dtype for name in names or self._own.headers)

    def bias(self, module: str) -> Tensor | None:
        """The summand of a module's bias, in float64."""
        return super().bias(module) if module in self.modules else None

    def _config(self) -> dict[str, Any]:
        """In PEFT's words, as far as they go."""
        found = {own for own in self._file.headers if own.endswith(".lora_A.weight")}
        modules = sorted(name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in found)
        whole = sorted(name.removeprefix(PREFIX).removesuffix(".weight") for name in self._file.headers if _set(name))
        return adapter_config(
            max((self._file.headers[name].shape[0] for name in found), default=1),
            modules,
            base=None,
            revision=None,
            task_type=None,
            auto_mapping=None,
            fan_in_fan_out=False,
            whole=whole,
            lora_bias=any(name.endswith(".lora_B.bias") for name in self._file.headers),
        )


def _set(name: str) -> bool:
    return name.endswith(".weight") and ".lora_" not in name


def _sorted(file: File, label: str) -> dict[str, dict[tuple[str, ...], dict[str, str]]]:
    """The file's names of parts, by component and modules.

    Raises:
        AdapterError: A tensor is of another kind.
    """
    found: dict[str, dict[tuple[str, ...], dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in file.headers:
        if (other := next((why for part, why in _OTHERS.items() if part in name), None)) is not None:
            raise AdapterError(
                f"`{label}` is {other} (`{name}`): not base + b @ a of a rank. Merge it into its base in the program "
                "that made it, and extract from that."
            )
        named: Named | None = read_name(name)
        if named is None:
            raise AdapterError(f"`{label}` holds `{name}`, which is no part of a LoRA that is known here.")
        parts = found[named.component][named.modules]
        if named.part in parts:
            raise AdapterError(f"`{label}` holds both `{parts[named.part]}` and `{name}`.")
        parts[named.part] = name
    return found


def _of_linear1(hidden: int, index: int, total: int) -> slice:
    return slice(index * hidden, (index + 1) * hidden if index < 3 else total)


def _tucker(mid: Tensor, down: Tensor) -> Tensor:
    """The first two of three factors of a convolution as one: LyCORIS' `up`, `mid`, `down`."""
    made = torch.einsum("pqkl,qi->pikl", mid.float(), down.float().reshape(prod(down.shape[:1]), -1))
    return made.contiguous()
