"""An adapter as the loaders of serving engines see it: its configuration and the headers of its tensors, none read.

What rules ask of it is a property here, named after what it finds: the names of the tensors, modules or values at
fault, or nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from peft_posthoc.checkpoint import Checkpoint, Header, open_checkpoint
from peft_posthoc.errors import AdapterError, CheckpointError
from peft_posthoc.folder import File
from peft_posthoc.layout import EMBEDDING, LINEAR, LayerKind, Layout, layout_of
from peft_posthoc.peft_format import CONFIG, PREFIX, WEIGHTS
from peft_posthoc.plan import Slot, slots_of
from peft_posthoc.portable import safe_rank

PICKLE = "adapter_model.bin"
# What PEFT 0.6's LoraConfig takes; every version since knows these.
OLD_KEYS = frozenset(
    {
        *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r"),
        *("target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save"),
        *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    }
)
# Names of initial weights that PEFT takes out of the base when it loads the adapter, by their beginning.
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq")
# `module.lora_A.weight`, or with the adapter's name inside, as a state dict that was not saved by PEFT has it.
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B)(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING_FACTOR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>A|B)(?:\.(?P<adapter>[^.]+))?")
_LORA_BIAS = re.compile(r".+\.lora_B(?:\.[^.]+)?\.bias")
_EMBEDDING_LEAVES = ("embed_tokens", "wte", "word_embeddings")
_HEAD_LEAVES = ("lm_head", "embed_out")
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<leaf>[^.]+)")
_DENSE = re.compile(r".+\.(mlp|shared_experts?|feed_forward)\.(gate_proj|up_proj|down_proj)")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_OTHER_MODALITIES = ("vision", "visual", "audio", "speech")
# How SGLang 0.5.23 calls what it fuses (`srt/lora/utils.py`, `get_normalized_target_modules`).
_SGLANG_NAMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("r",), (int,)),
    **dict.fromkeys(("lora_alpha",), (int, float)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict, type(None))),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (list, type(None))),
    **dict.fromkeys(("target_modules",), (list, str, type(None))),
    **dict.fromkeys(("bias",), (str,)),
}


class Factored(NamedTuple):
    """A module with factors: `b` is m x r, `a` is r x n."""

    kind: LayerKind
    a: str
    """The tensor's name in the file."""
    b: str
    rank: int
    m: int
    n: int


@dataclass(frozen=True)
class Served:
    """The model that the adapter is to be served on: its class and the headers of its tensors."""

    checkpoint: Checkpoint
    layout: Layout
    slots: Mapping[str, Slot]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Served:
        """Read a model folder's configuration and headers.

        Raises:
            CheckpointError: It is no model folder.
        """
        if not Path(folder).is_dir():
            raise CheckpointError(f"The base `{folder}` is no folder. Give the folder of the model to be served.")
        checkpoint = open_checkpoint(folder, role="base")
        layout = layout_of(checkpoint)
        return cls(checkpoint, layout, slots_of(checkpoint.headers, layout))

    @property
    def model_type(self) -> str:
        """As the configuration calls it."""
        return str((self.checkpoint.config or {}).get("model_type") or "")

    @property
    def vocabulary(self) -> int | None:
        """Its size, where the configuration tells it."""
        config = self.checkpoint.config or {}
        size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
        return int(size) if size else None

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        layout = self.layout
        return any(layout.head in {owner, *users} for owner, users in layout.ties.items() if users)


@dataclass(frozen=True)
class Subject:
    """What is known of an adapter without reading a tensor."""

    label: str
    config: Mapping[str, Any]
    weights: File
    """The file that PEFT would load."""
    weights_name: str
    others: Mapping[str, tuple[str, ...]]
    """By name of every other safetensors file in the folder, its tensors."""
    added_tokens: Mapping[str, int]
    base: Served | None

    @classmethod
    def read(cls, folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Subject:
        """Read an adapter folder's configuration and headers.

        Args:
            folder: The adapter.
            base: The folder of the model that it is to be served on.

        Raises:
            AdapterError: It is no LoRA adapter.
            CheckpointError: The base is no model folder.
        """
        where = Path(folder)
        if not where.is_dir():
            raise AdapterError(f"`{where}` is no folder. Give the folder of a PEFT adapter.")
        config = _config(where)
        name = next((name for name in (WEIGHTS, PICKLE) if (where / name).is_file()), None)
        if name is None:
            held = ", ".join(sorted(path.name for path in where.iterdir())[:5])
            raise AdapterError(f"`{where}` holds no {WEIGHTS} (it holds {held}).")
        others = sorted(path for path in where.glob("*.safetensors") if path.name != name)
        try:
            weights = File(where / name, label=str(folder))
            strays = {path.name: tuple(File(path, label=str(path)).headers) for path in others}
        except CheckpointError as error:
            raise AdapterError(str(error)) from error
        served = None if base is None else Served.open(base)
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
        found: dict[tuple[str, LayerKind], dict[str, str]] = defaultdict(dict)
        for name in self.headers:
            for pattern, kind in ((_FACTOR, LINEAR), (_EMBEDDING_FACTOR, EMBEDDING)):
                if match := pattern.fullmatch(name):
                    sides = found[match["module"].removeprefix(PREFIX), kind]
                    if match["side"] in sides:
                        raise AdapterError(f"`{self.label}` holds both `{sides[match['side']]}` and `{name}`.")
                    sides[match["side"]] = name
        modules = {}
        for (module, kind), sides in found.items():
            if len(sides) < 2:
                raise AdapterError(f"`{self.label}` holds `{next(iter(sides.values()))}` without its counterpart.")
            a, b = self.headers[sides["A"]].shape, self.headers[sides["B"]].shape
            if len(a) < 2 or len(b) != len(a) or a[0] != b[1]:
                raise AdapterError(f"The factors of `{module}` in `{self.label}` do not fit: {list(b)} and {list(a)}.")
            modules[module] = Factored(kind, sides["A"], sides["B"], a[0], b[0], a[1])
        return modules

    @cached_property
    def _rest(self) -> tuple[str, ...]:
        factors = {name for module in self.modules.values() for name in (module.a, module.b)}
        return tuple(name for name in self.headers if name not in factors)

    @cached_property
    def magnitudes(self) -> tuple[str, ...]:
        """DoRA's vectors."""
        return tuple(name for name in self._rest if ".lora_magnitude_vector" in name)

    @cached_property
    def lora_biases(self) -> tuple[str, ...]:
        """What `lora_bias` adds beside the factors."""
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
        parents = {str(name).rpartition(".")[0] for name in self.config.get("target_parameters") or ()}

        def is_one(module: str) -> bool:
            own = module.removesuffix(".base_layer")
            return any(own == parent or own.endswith(f".{parent}") for parent in parents)

        return tuple(module for module in self.modules if is_one(module))

    @cached_property
    def experts(self) -> tuple[str, ...]:
        """Modules of single experts."""
        return tuple(module for module in self.modules if _EXPERT.fullmatch(module))

    @cached_property
    def dense_beside_experts(self) -> tuple[str, ...]:
        """Dense or shared MLPs in a file that holds single experts too."""
        return tuple(module for module in self.modules if _DENSE.fullmatch(module)) if self.experts else ()

    @cached_property
    def partial_experts(self) -> tuple[str, ...]:
        """Single experts of which some, but not all three projections are there."""
        held: dict[str, set[str]] = defaultdict(set)
        for match in filter(None, map(_EXPERT.fullmatch, self.experts)):
            held[f"{match['experts']}.{match['index']}"].add(match["leaf"])
        full = ({"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"})
        return tuple(expert for expert, leaves in held.items() if not any(leaves >= names for names in full))

    @cached_property
    def embeddings(self) -> tuple[str, ...]:
        """Token embeddings with factors."""
        return tuple(
            module
            for module, own in self.modules.items()
            if own.kind is EMBEDDING or _leaf(module) in _EMBEDDING_LEAVES
        )

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Output heads with factors."""
        return tuple(module for module in self.modules if _leaf(module) in _HEAD_LEAVES)

    @cached_property
    def other_modalities(self) -> tuple[str, ...]:
        """Modules of a vision or audio tower."""
        return tuple(
            module
            for module in self.modules
            if any(word in part for part in module.split(".") for word in _OTHER_MODALITIES)
        )

    @cached_property
    def without_prefix(self) -> tuple[str, ...]:
        """Tensors that are not called what `PeftModel` calls them."""
        return tuple(name for name in self.headers if not name.startswith(PREFIX))

    @cached_property
    def named_after_adapter(self) -> tuple[str, ...]:
        """Factors with the adapter's name in theirs (`lora_A.default.weight`)."""
        matches = (_FACTOR.fullmatch(name) or _EMBEDDING_FACTOR.fullmatch(name) for name in self.headers)
        return tuple(match.string for match in matches if match and match["adapter"])

    def alone(self, leaf: str, *, without: str, unless: Collection[str] = ()) -> tuple[str, ...]:
        """Modules called `leaf` that have no sibling called `without`, nor one of `unless`."""
        return tuple(
            module
            for module in self.modules
            if _leaf(module) == leaf
            and not any(f"{module.removesuffix(leaf)}{other}" in self.modules for other in (without, *unless))
        )

    @cached_property
    def missing_layers(self) -> tuple[str, ...]:
        """Layers that lack a name which others have.

        The base's class tells which layers there are; without it, the numbers in the file do.
        """
        patterns = {_pattern(module) for module in self.modules if module not in (*self.experts, *self.fused_experts)}
        if self.base is not None:
            there = self.base.layout.classes
            return tuple(module for module in there if _pattern(module) in patterns and module not in self.modules)
        if self.config.get("layers_to_transform") is not None:
            return (f"layers_to_transform={self.config['layers_to_transform']}",)
        numbers: dict[str, set[int]] = defaultdict(set)
        last: dict[str, int] = defaultdict(int)
        for module in self.modules:
            if (pattern := _pattern(module)) in patterns and (number := _NUMBER.search(module)):
                numbers[pattern].add(int(number[0]))
                stack = module[: number.start()]
                last[stack] = max(last[stack], int(number[0]))
        return tuple(
            pattern.replace("*", str(index), 1)
            for pattern, held in numbers.items()
            for index in range(last[pattern[: pattern.index("*")]] + 1)
            if index not in held
        )

    # What its configuration says.

    def without(self, *keys: str) -> tuple[str, ...]:
        """Those of these keys that the configuration lacks."""
        return tuple(key for key in keys if self.config.get(key) is None)

    def setting(self, *keys: str) -> tuple[str, ...]:
        """Those of these keys that are set to something, with what."""
        return tuple(f"{key}={self.config[key]!r}" for key in keys if self.config.get(key))

    @property
    def r(self) -> int:
        """The configuration's rank."""
        return int(self.config.get("r", 8))

    @property
    def alpha(self) -> float:
        """The configuration's `lora_alpha`."""
        return float(self.config.get("lora_alpha", 8))

    @property
    def rslora(self) -> bool:
        """Whether PEFT divides by the root of the rank."""
        return bool(self.config.get("use_rslora"))

    @property
    def max_rank(self) -> int:
        """The largest rank that the configuration or a tensor has."""
        fused = {*self.fused_experts}
        ranks = (own.rank for module, own in self.modules.items() if module not in fused)
        return max([self.r, *map(int, (self.config.get("rank_pattern") or {}).values()), *ranks])

    @property
    def unknown_keys(self) -> tuple[str, ...]:
        """Keys that PEFT 0.6 does not know."""
        return tuple(sorted(key for key in self.config if key not in OLD_KEYS))

    @property
    def mutating_init(self) -> tuple[str, ...]:
        """Initial weights that are taken out of the base."""
        init = self.config.get("init_lora_weights")
        return (f"init_lora_weights={init!r}",) if str(init).lower().startswith(_MUTATING_INITS) else ()

    @property
    def variants(self) -> tuple[str, ...]:
        """Settings with which PEFT computes something else than base + b @ a, and that vLLM knows of."""
        return self.setting("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")

    @property
    def bias_setting(self) -> tuple[str, ...]:
        """`bias`, unless it is "none"."""
        bias = self.config.get("bias", "none")
        return () if bias == "none" else (f"bias={bias!r}",)

    def kept_whole(self, *allowed: str) -> tuple[str, ...]:
        """`modules_to_save`, but for the allowed."""
        return tuple(str(name) for name in self.config.get("modules_to_save") or () if name not in allowed)

    def is_kept_whole(self, name: str) -> bool:
        """Whether PEFT takes the tensor to belong to one of `modules_to_save`."""
        ends = self.kept_whole()
        parts = name.removeprefix(PREFIX).split(".")
        return any(".".join(parts[:depth]).endswith(end) for end in ends for depth in range(1, len(parts)))

    @property
    def target_pattern(self) -> tuple[str, ...]:
        """`target_modules`, where it is a regular expression."""
        target = self.config.get("target_modules")
        return (target,) if isinstance(target, str) and target not in ("all", "all-linear") else ()

    @property
    def untargeted(self) -> tuple[str, ...]:
        """Modules whose name is in no target, as SGLang compares them."""
        target = self.config.get("target_modules")
        if not isinstance(target, list):
            return ()
        names = {_SGLANG_NAMES.get(leaf, leaf) for leaf in map(_leaf, map(str, target))}
        return tuple(module for module in self.modules if _SGLANG_NAMES.get(_leaf(module), _leaf(module)) not in names)

    @property
    def untargeted_in_peft(self) -> tuple[str, ...]:
        """Modules that PEFT does not take `target_modules` to mean."""
        target, excluded = self.config.get("target_modules"), self.config.get("exclude_modules")
        if target is None:
            return () if self.fused_experts else ("target_modules=None",)
        return tuple(
            module
            for module in self.modules
            if module not in self.fused_experts and (not _means(target, module) or _means(excluded, module))
        )

    # Rank and scale.

    def configured_rank(self, module: str) -> int:
        """The rank that PEFT gives the module."""
        return int(self._override("rank_pattern", module) or self.r)

    def scale(self, module: str) -> float:
        """What PEFT multiplies the module's factors with."""
        alpha = self._override("alpha_pattern", module)
        rank = self.configured_rank(module)
        return (self.alpha if alpha is None else float(alpha)) / (math.sqrt(rank) if self.rslora else rank)

    def _override(self, key: str, module: str) -> Any:
        # Factors of fused experts are named after the module, and the patterns after its parameters.
        if module in self.fused_experts:
            parameter = "gate_up_proj" if module.endswith(".base_layer") else "down_proj"
            module = f"{module.removesuffix('.base_layer')}.{parameter}"
        patterns = self.config.get(key) or {}
        # PEFT takes the first that is found at the end of the name.
        return next((own for pattern, own in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), None)

    def misscaled(self, scale: Callable[[Factored], float]) -> tuple[str, ...]:
        """Modules that an engine with this formula multiplies with something else than PEFT, and how much."""
        found = []
        for module, own in self.modules.items():
            wanted, got = self.scale(module), scale(own)
            if module not in self.fused_experts and not math.isclose(wanted, got, rel_tol=1e-6):
                found.append(f"{module} (by {got:.3g} instead of {wanted:.3g})")
        return tuple(found)

    @cached_property
    def other_ranks(self) -> tuple[str, ...]:
        """Modules whose rank is not the configuration's `r`."""
        return tuple(
            f"{module} ({own.rank} instead of {self.r})"
            for module, own in self.modules.items()
            if own.rank != self.r and module not in self.fused_experts
        )

    @cached_property
    def misranked(self) -> tuple[str, ...]:
        """Modules whose rank is not what PEFT expects of the configuration."""
        return tuple(
            f"{module} ({own.rank} instead of {self.configured_rank(module)})"
            for module, own in self.modules.items()
            if own.rank != self.configured_rank(module) and module not in self.fused_experts
        )

    @cached_property
    def mixed_leaves(self) -> tuple[str, ...]:
        """Names whose layers have different ranks even after LoRAX and TGI pad them."""
        ranks: dict[str, set[int]] = defaultdict(set)
        for module, own in self.modules.items():
            ranks[_leaf(module)].add(safe_rank(own.rank))
        return tuple(leaf for leaf, own in ranks.items() if len(own) > 1)

    @property
    def padded_rank(self) -> tuple[str, ...]:
        """The rank, where LoRAX and TGI pad it and then scale all but the first name by the padded one."""
        several = len({_leaf(module) for module in self.modules}) > 1
        return (f"rank {self.r}",) if several and safe_rank(self.r) != self.r else ()

    # The model that it is served on.

    @cached_property
    def strangers(self) -> tuple[str, ...]:
        """Modules that the base's class does not have."""
        if self.base is None:
            return ()
        classes, handled = self.base.layout.classes, {*self.experts}
        return tuple(
            module
            for module in self.modules
            if module not in handled and module.removesuffix(".base_layer") not in classes
        )

    @cached_property
    def fused_names(self) -> tuple[str, ...]:
        """Fused projections of a class that has them one by one."""
        parts = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}
        classes = self.base.layout.classes if self.base is not None else {}
        return tuple(
            module
            for module in self.strangers
            if (leaf := _leaf(module)) in parts and f"{module.removesuffix(leaf)}{parts[leaf]}" in classes
        )

    def unfitting(self, *, larger: bool, smaller: bool) -> tuple[str, ...]:
        """Modules whose factors are larger or smaller than the base's weight."""
        if self.base is None:
            return ()
        found = []
        for module, own in self.modules.items():
            slot = self.base.slots.get(module)
            if slot is None or (own.m, own.n) == (slot.m, slot.n):
                continue
            if larger if own.m > slot.m or own.n > slot.n else smaller:
                found.append(f"{module} ({own.m} x {own.n}, in the base {slot.m} x {slot.n})")
        return tuple(found)

    @property
    def tied(self) -> tuple[str, ...]:
        """Embeddings and heads with factors, of a base that ties them."""
        return (*self.embeddings, *self.heads) if self.base is not None and self.base.tied else ()

    @property
    def maybe_tied(self) -> tuple[str, ...]:
        """The same, where no base tells."""
        return (*self.embeddings, *self.heads) if self.base is None else ()

    def of_model(self, names: Iterable[str], *types: str) -> tuple[str, ...]:
        """The names, if the base is of one of these model types."""
        return tuple(names) if self.base is not None and self.base.model_type in types else ()

    def not_of_model(self, names: Iterable[str], *types: str) -> tuple[str, ...]:
        """The names, unless the base is known to be of one of these model types."""
        return () if self.base is not None and self.base.model_type in types else tuple(names)

    @cached_property
    def incompletely_whole(self) -> tuple[str, ...]:
        """Modules of the base that PEFT takes to be in the file whole, and which are not."""
        if self.base is None:
            return ()
        ends = self.kept_whole()
        held = {name.removeprefix(PREFIX).rpartition(".")[0] for name in self.headers}
        return tuple(
            module
            for module in self.base.layout.classes
            if ends and module.endswith(ends) and not any(f"{own}.".startswith(f"{module}.") for own in held)
        )

    @property
    def new_tokens(self) -> tuple[str, ...]:
        """Tokens of `added_tokens.json` that the base's vocabulary does not have, or all, where it is not known."""
        size = self.base.vocabulary if self.base is not None else None
        return tuple(token for token, number in self.added_tokens.items() if size is None or number >= size)


def _means(target: Any, module: str) -> bool:
    """Whether PEFT takes a list of names, or a regular expression, to mean the module."""
    if isinstance(target, str):
        return target == "all-linear" or re.fullmatch(target, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in target or ())


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _pattern(module: str) -> str:
    return _NUMBER.sub("*", module)


def _some(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in list(names)[:3]) or "nothing"


def _config(where: Path) -> dict[str, Any]:
    path = where / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"`{path}` is not a readable configuration of an adapter: {reason}.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"`{path}` is not a configuration: expected a JSON object.")
    kind = config.get("peft_type") or "LORA"
    if str(kind).upper() != "LORA":
        raise AdapterError(f"`{where}` is a {kind} adapter; only LoRA adapters are known here.")
    for key, types in _TYPES.items():
        value = config.get(key, types[0]())
        if not isinstance(value, types) or isinstance(value, bool):
            raise AdapterError(f"`{path}` sets `{key}` to {value!r}, which is no value for it.")
    if config.get("r", 8) < 1:
        raise AdapterError(f"`{path}` sets `r` to {config['r']}; a rank is at least 1.")
    for key in ("target_modules", "exclude_modules"):
        _compiled(config.get(key) or "", key, path)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (config.get(key) or {}).items():
            _compiled(pattern, key, path)
            if not isinstance(value, int | float) or isinstance(value, bool) or (key == "rank_pattern" and value < 1):
                raise AdapterError(f"`{key}` of `{path}` gives `{pattern}` the value {value!r}.")
    return config


def _compiled(pattern: Any, key: str, path: Path) -> None:
    try:
        re.compile(pattern if isinstance(pattern, str) else "")
    except re.error as error:
        raise AdapterError(f"`{key}` of `{path}` holds `{pattern}`, no regular expression: {error}.") from error


def _added_tokens(where: Path) -> dict[str, int]:
    path = where / "added_tokens.json"
    if not path.is_file():
        return {}
    try:
        added = json.loads(path.read_text(encoding="utf-8"))
        return {str(token): int(number) for token, number in added.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"`{path}` is not a list of added tokens: {error}.") from error
