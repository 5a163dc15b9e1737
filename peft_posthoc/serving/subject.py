"""An adapter as the loaders of serving engines see it: its configuration and the headers of its tensors, none read.

`rules` find what engines do not take in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft_posthoc.adapters.config import CONFIG, PICKLE, WEIGHTS, read_config
from peft_posthoc.adapters.foreign import refuse_foreign
from peft_posthoc.adapters.scale import Setting, alpha_of, parameters_of, rank_of, settings
from peft_posthoc.adapters.tensors import Factored, factored, kept_whole
from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.folder import File
from peft_posthoc.checkpoints.gguf import SUFFIX
from peft_posthoc.checkpoints.quantized.undecoded import quantized
from peft_posthoc.errors import AdapterError, CheckpointError
from peft_posthoc.json_file import read_json
from peft_posthoc.models.kinds import EMBEDDING
from peft_posthoc.models.model import Model
from peft_posthoc.serving.arrived import Arrived, arrived
from peft_posthoc.sources import open_checkpoint

_LORA_BIAS = re.compile(r".+\.lora_B(?:\.[^.]+)?\.bias")
_EMBEDDING_LEAVES = ("embed_tokens", "wte", "word_embeddings")
_HEAD_LEAVES = ("lm_head", "embed_out")
EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<leaf>[^.]+)")


@dataclass(frozen=True)
class Subject:
    """An adapter, as far as it is known without reading a tensor."""

    label: str
    config: Mapping[str, Any]
    weights: File
    """The file that PEFT would load."""
    weights_name: str
    others: Mapping[str, tuple[str, ...]]
    """By name of every other safetensors file in the folder, its tensors."""
    added_tokens: Mapping[str, int]
    base: Model | None

    @classmethod
    def read(cls, folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Subject:
        """Read an adapter folder's configuration and headers.

        Args:
            folder: The adapter.
            base: The folder or GGUF file of the model that it is to be served on.

        Raises:
            AdapterError: It is no LoRA adapter.
            CheckpointError: The base is none.
        """
        where = Path(folder)
        refuse_foreign(where)
        if not where.is_dir():
            what = "is no folder" if where.exists() else "does not exist"
            raise AdapterError(f"`{where}` {what}. Give the folder of a PEFT adapter.")
        config = read_config(where)
        name = next((name for name in (WEIGHTS, PICKLE) if (where / name).exists()), None)
        if name is None:
            held = ", ".join(sorted(path.name for path in where.iterdir())[:5])
            raise AdapterError(f"`{where}` holds no {WEIGHTS} (it holds {held}).")
        others = sorted(path for path in where.glob("*.safetensors") if path.name != name)
        try:
            weights = File(where / name, label=str(folder))
            strays = {path.name: tuple(File(path, label=str(path)).headers) for path in others}
        except CheckpointError as error:
            raise AdapterError(str(error)) from error
        served = None if base is None else _opened(base)
        subject = cls(str(folder), config, weights, name, strays, _added_tokens(where), served)
        if not subject.modules:
            raise AdapterError(f"`{where}` holds no LoRA factors. Its tensors are called {_some(subject.headers)}.")
        return subject

    @property
    def headers(self) -> Mapping[str, Header]:
        """Shape and dtype of every tensor in the file."""
        return self.weights.headers

    # What its tensors are.

    @cached_property
    def modules(self) -> dict[str, Factored]:
        """By module, without PEFT's prefix, what the file holds for it."""
        return factored(self.headers, self.label)

    @cached_property
    def _rest(self) -> tuple[str, ...]:
        factors = {name for module in self.modules.values() for name in (module.a_name, module.b_name)}
        return tuple(name for name in self.headers if name not in factors)

    @cached_property
    def magnitudes(self) -> tuple[str, ...]:
        """DoRA's vectors."""
        return tuple(name for name in self._rest if ".lora_magnitude_vector" in name)

    @cached_property
    def lora_biases(self) -> tuple[str, ...]:
        """Tensors that `lora_bias` adds beside the factors."""
        return tuple(name for name in self._rest if _LORA_BIAS.fullmatch(name))

    @cached_property
    def biases(self) -> tuple[str, ...]:
        """Biases of the model itself."""
        return tuple(name for name in self._rest if name.endswith(".bias") and name not in self.lora_biases)

    @cached_property
    def norms(self) -> tuple[str, ...]:
        """Norms' weights: vectors that are no bias."""
        return tuple(
            name
            for name in self._rest
            if len(self.headers[name].shape) == 1 and name.endswith(".weight") and name not in self.magnitudes
        )

    @cached_property
    def base_copies(self) -> tuple[str, ...]:
        """The base's own embeddings, which PEFT saves beside the factors of embeddings."""
        return tuple(name for name in self._rest if name.endswith(".base_layer.weight"))

    @cached_property
    def whole(self) -> tuple[str, ...]:
        """All else: weights as they are after the fine-tune."""
        known = {*self.magnitudes, *self.lora_biases, *self.biases, *self.norms, *self.base_copies}
        return tuple(name for name in self._rest if name not in known)

    # Which modules these are.

    @cached_property
    def fused_experts(self) -> tuple[str, ...]:
        """Modules that PEFT's `target_parameters` made: one pair of factors for all experts."""
        return tuple(module for module in self.modules if parameters_of(module, self.config))

    @cached_property
    def experts(self) -> tuple[str, ...]:
        """Modules of single experts."""
        return tuple(module for module in self.modules if EXPERT.fullmatch(module))

    @cached_property
    def embeddings(self) -> tuple[str, ...]:
        """Token embeddings with factors."""
        return tuple(
            module
            for module, own in self.modules.items()
            if own.kind is EMBEDDING or leaf_of(module) in _EMBEDDING_LEAVES
        )

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Output heads with factors."""
        return tuple(module for module in self.modules if leaf_of(module) in _HEAD_LEAVES)

    # What its configuration says.

    def without(self, *keys: str) -> tuple[str, ...]:
        """Keys, of these, that the configuration lacks."""
        return tuple(key for key in keys if self.config.get(key) is None)

    def setting(self, *keys: str) -> tuple[str, ...]:
        """Keys, of these, that are set to something, with their values."""
        return tuple(f"{key}={self.config[key]!r}" for key in keys if self.config.get(key))

    @property
    def r(self) -> int:
        """The configuration's rank."""
        return rank_of(self.config)

    @property
    def alpha(self) -> float:
        """The configuration's `lora_alpha`."""
        return alpha_of(self.config)

    @property
    def rslora(self) -> bool:
        """True where PEFT divides by the root of the rank."""
        return bool(self.config.get("use_rslora"))

    @property
    def max_rank(self) -> int:
        """The largest rank that the configuration or a tensor has."""
        fused = {*self.fused_experts}
        ranks = (own.rank for module, own in self.modules.items() if module not in fused)
        return max([self.r, *map(int, (self.config.get("rank_pattern") or {}).values()), *ranks])

    def kept_whole(self, *allowed: str) -> tuple[str, ...]:
        """`modules_to_save`, but for the allowed."""
        return tuple(str(name) for name in self.config.get("modules_to_save") or () if name not in allowed)

    def is_kept_whole(self, name: str) -> bool:
        """Tell whether PEFT takes the tensor to belong to one of `modules_to_save`."""
        return kept_whole(name, self.config)

    @cached_property
    def quantised(self) -> dict[str, str]:
        """By module whose weight the base holds as codes, their format; none without a base."""
        if self.base is None:
            return {}
        stored = self.base.checkpoint
        held = {one.weight: one.format for one in quantized(stored).values()}
        held |= {name: form for name in stored.headers if (form := stored.coded_as(name))}
        return {name.removesuffix(".weight"): form for name, form in held.items()}

    @cached_property
    def in_peft(self) -> Arrived | None:
        """What PEFT does with it on the base; None without one, or where its class is not known."""
        return None if self.base is None else arrived(self.base, self.config, self.headers, self.label)

    # Rank and scale.

    def configured_rank(self, module: str) -> int:
        """The rank that PEFT gives the module."""
        return self._settings[module].rank

    def scale(self, module: str) -> float:
        """The number that PEFT multiplies the module's factors with."""
        return self._settings[module].scale

    @cached_property
    def _settings(self) -> dict[str, Setting]:
        return settings(self.config, self.modules, self.label)


def _opened(folder: str | os.PathLike[str]) -> Model:
    """The model in a folder or a GGUF file.

    Raises:
        CheckpointError: It is no model folder.
    """
    if not (Path(folder).is_dir() or (Path(folder).is_file() and Path(folder).suffix == SUFFIX)):
        raise CheckpointError(
            f"The base `{folder}` is no folder, and no GGUF file. Give the folder of the model to be served."
        )
    if (Path(folder) / CONFIG).is_file() and not (Path(folder) / "config.json").is_file():
        raise CheckpointError(f"The base `{folder}` is an adapter. Give the folder of the model to be served.")
    return Model.of(open_checkpoint(folder, role="base"))


def leaf_of(module: str) -> str:
    """The last part of a module's name."""
    return module.rpartition(".")[2]


def _some(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in list(names)[:3]) or "nothing"


def _added_tokens(where: Path) -> dict[str, int]:
    path = where / "added_tokens.json"
    if not path.is_file():
        return {}
    try:
        added = read_json(path)
        return {str(token): int(number) for token, number in added.items()}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise AdapterError(f"`{path}` is not a list of added tokens: {error}.") from error
