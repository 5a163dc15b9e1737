"""LoRA files of image and video models (diffusers, ComfyUI, kohya's scripts), seen as PEFT's own."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import widest
from peft_posthoc.adapters.config import adapter_config
from peft_posthoc.adapters.image_metadata import config_in
from peft_posthoc.adapters.image_names import Named, of_model, read_name
from peft_posthoc.adapters.lycoris import as_differences, in_shape
from peft_posthoc.adapters.module import Kind, Module
from peft_posthoc.adapters.names import PREFIX, patterns
from peft_posthoc.adapters.plain import not_plain
from peft_posthoc.adapters.reader import LoraFolder
from peft_posthoc.adapters.scale import settings
from peft_posthoc.adapters.tensors import factored
from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.folder import File
from peft_posthoc.checkpoints.view import Piece, View, same
from peft_posthoc.errors import AdapterError, CheckpointError
from peft_posthoc.models.original_modules import SWAPPED, TURNED, family_of, swapped

# Refused; LoHa and LoKr are differences by now (`lycoris`), where they are nothing more.
_OTHERS = {
    "dora_scale": "DoRA, which also rescales the base's weights",
    "lora_magnitude_vector": "DoRA, which also rescales the base's weights",
    "oft_": "OFT, which turns the base's weights",
    "hada_": "LoHa in Tucker's form, or DoRA with it",
    "lokr_": "LoKr in Tucker's form, or DoRA with it",
}
# Of no module, or not its weight.
_PARAMETERS = ("scale_shift_table", "_pad_token", "pos_embed")


class ImageFile(LoraFolder):
    """One component's LoRA in a single file; a scale that is not said is one.

    Args:
        path: The file.
        component: One of those in it; None for the only one.
        known: The headers of the model's tensors, if it is known: they tell what a name in the file means.

    Raises:
        AdapterError: It cannot be read, has several components, or is more than factors, differences and whole weights.
    """

    def __init__(self, path: Path, component: str | None = None, known: Mapping[str, Header] = {}) -> None:
        self.label = str(path) if component is None else f"{path}:{component}"
        self.place, self.files = path.absolute().parent, (path,)
        try:
            file = File(path, label=self.label)
        except CheckpointError as error:
            raise AdapterError(f"`{path}` is not a readable LoRA file: {str(error).removesuffix('.')}.") from error
        self._own, self._metadata = as_differences(file), file.metadata
        named = _named(self._own, self.label)
        family = _family(named, self._own)
        self._known = known
        own = of_model(self._known)
        self._turned = {
            name for name in _turned(named, family, self._own) if own.keys().isdisjoint(named[name].flat_names)
        }
        by_component = _sorted(named, family, own, self.label)
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
        self._file = View(self._own, pieces)
        self.config: Mapping[str, Any] = self._config()
        self._sort(self._file.headers)

    def _pieces(self) -> Iterator[tuple[str, Piece]]:
        """The tensors by PEFT's names, and in `added` what is added to the model's own by no factors."""
        for modules, parts in self._tensors.items():
            missing = {"up", "down"} & parts.keys()
            if len(missing) == 1:
                raise AdapterError(f"`{self.label}` holds `{parts[missing.pop()]}` without its counterpart.")
            for module, rows in zip(modules, self._rows(modules, parts), strict=True):
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
                key, name = f"{own}.{part}", self._tensor_of(module, leaf)
                piece = self._cut(parts[part], rows)
                self._added[name] = key
                yield key, in_shape(piece, self._known[name].shape) if name in self._known else piece

    def _tensor_of(self, module: str, leaf: str) -> str:
        if module in self._known or (not self._known and module.endswith(_PARAMETERS)):
            return module
        return f"{module}.scale" if f"{module}.scale" in self._known else f"{module}.{leaf}"

    def _down(self, parts: Mapping[str, str]) -> Piece:
        if "mid" not in parts:
            return same(self._own, parts["down"])
        mid, down = (self._own.headers[parts[part]] for part in ("mid", "down"))
        header = Header((mid.shape[0], down.shape[1], *mid.shape[2:]), torch.float32)
        return Piece((parts["mid"], parts["down"]), header, _tucker)

    def _cut(self, name: str, rows: slice | None) -> Piece:
        if rows is None:
            return Piece((name,), self._own.headers[name], swapped) if name in self._turned else same(self._own, name)
        header = self._own.headers[name]
        return Piece(
            (name,), Header((rows.stop - rows.start, *header.shape[1:]), header.dtype), lambda tensor: tensor[rows]
        )

    def _rows(self, modules: tuple[str, ...], parts: Mapping[str, str]) -> list[slice]:
        """The rows of each of the modules that one is fused of."""
        shapes = [self._own.headers[parts[part]].shape for part in parts if part not in ("down", "mid", "alpha")]
        total = shapes[0][0] if shapes and shapes[0] else 0
        # Flux: q, k, v, and four times as many of the MLP.
        shares = [4 if module.endswith("proj_mlp") else 1 for module in modules]
        if total % sum(shares):
            raise AdapterError(f"`{self.label}` holds {total} rows for the parts {', '.join(modules)}.")
        ends = [total // sum(shares) * end for end in accumulate(shares)]
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _modules(self) -> Iterator[Module]:
        biased = {name.removeprefix(PREFIX) for name in self.headers}
        found = factored(self.headers, self.label)
        told = config_in(self._metadata, self.component)
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

    def _sort(self, headers: Mapping[str, Header]) -> None:
        self.headers = headers
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


def _named(file: Checkpoint, label: str) -> dict[str, Named]:
    """What the names of the tensors say.

    Raises:
        AdapterError: A tensor is of another kind.
    """
    found: dict[str, Named] = {}
    for name in file.headers:
        if (other := next((why for part, why in _OTHERS.items() if part in name), None)) is not None:
            raise AdapterError(
                f"`{label}` is {other} (`{name}`): not base + b @ a of a rank. Merge it into its base in the program "
                "that made it, and extract from that."
            )
        if (named := read_name(name)) is None:
            raise AdapterError(f"`{label}` holds `{name}`, which is no part of a LoRA that is known here.")
        found[name] = named
    return found


def _family(named: Mapping[str, Named], file: Checkpoint) -> str | None:
    """The class that the UNet or transformer is of by its author's names; None where it has those of diffusers."""
    first = re.compile(r"single_blocks.\d+.linear1|double_blocks.\d+.(img|txt)_mlp.0")
    widths = (width for module, width in _widening(named, file).items() if first.fullmatch(module))
    return family_of({one.module: one.underscored for one in named.values() if one.original}, next(widths, None))


def _widening(named: Mapping[str, Named], file: Checkpoint) -> dict[str, int]:
    """How many times as many rows as columns modules have."""
    sizes: dict[str, dict[str, int]] = defaultdict(dict)
    for name, one in named.items():
        if one.original and one.part in ("up", "down"):
            sizes[one.module][one.part] = file.headers[name].shape[one.part == "down"]
    return {name: own["up"] // own["down"] for name, own in sizes.items() if len(own) == 2 and own["down"]}


def _turned(named: Mapping[str, Named], family: str | None, file: Checkpoint) -> set[str]:
    """The tensors that have their halves the other way round by their authors' names."""
    if family not in TURNED:
        return set()
    # Of SD3's last block, which is the only one with as few rows, and the only one of whose bias ComfyUI needs it.
    last, widening = re.compile(r"joint_blocks.\d+.context_block.adaLN_modulation.1"), _widening(named, file)
    found = {one.module for one in named.values() if one.original and one.is_called(SWAPPED)}
    found |= {one.module for one in named.values() if last.fullmatch(one.module) and widening.get(one.module, 2) == 2}
    return {name for name, one in named.items() if one.original and one.module in found}


def _sorted(
    named: Mapping[str, Named], family: str | None, own: Mapping[str, str], label: str
) -> dict[str, dict[tuple[str, ...], dict[str, str]]]:
    """The file's names of parts, by component and modules.

    Raises:
        AdapterError: Two tensors are the same part.
    """
    found: dict[str, dict[tuple[str, ...], dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name, one in named.items():
        known = next((own[flat] for flat in one.flat_names if flat in own), None)
        parts = found[one.component][one.modules(family) if known is None else (known,)]
        if one.part in parts:
            raise AdapterError(f"`{label}` holds both `{parts[one.part]}` and `{name}`.")
        parts[one.part] = name
    return dict(sorted(found.items()))


def _tucker(mid: Tensor, down: Tensor) -> Tensor:
    """The first two of three factors of a convolution as one: LyCORIS' `up`, `mid`, `down`."""
    made = torch.einsum("pqkl,qi->pikl", mid.float(), down.float().reshape(prod(down.shape[:1]), -1))
    return made.contiguous()
