"""The layout of a model that is there, or whose class transformers has: the class knows what its weights are."""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_posthoc.errors import CheckpointError, PosthocError
from peft_posthoc.models.config import architecture, task_type
from peft_posthoc.models.kinds import EMBEDDING, EXPERT, EXPERT_IN_OUT, kind_of
from peft_posthoc.models.layout import Layout, Stack
from peft_posthoc.models.peft_experts import names_of_experts
from peft_posthoc.models.remote_code import without_code


def class_of(name: str) -> Any:
    """The class of models that transformers has by this name; None if it has none."""
    import transformers

    cls = getattr(transformers, name, None)
    is_model = isinstance(cls, type) and issubclass(cls, nn.Module)
    return cls if is_model and getattr(cls, "config_class", None) is not None else None


# How configurations call the number of their layers, blocks or experts, and the most that are built.
_COUNT = re.compile(r"(?!.*size).*(layers?|blocks|experts|depth)")
MOST = 10_000


def build(config: Mapping[str, Any]) -> nn.Module | None:
    """The model of a configuration, without values, if transformers has its class, or diffusers.

    Raises:
        CheckpointError: The class cannot be built with what the configuration says.
    """
    check_counts(config)
    try:
        return _built(config)
    except PosthocError:
        raise
    except Exception as error:
        # Every class of the two libraries fails in its own way on numbers and names that it does not expect.
        what = architecture(config) or config.get("_class_name")
        raise CheckpointError(
            f"A {what} cannot be built as its configuration says: {type(error).__name__}: {error}"
        ) from error


def check_counts(config: Mapping[str, Any]) -> None:
    """Refuse more layers or experts than anybody can wait for.

    Raises:
        CheckpointError: There are more.
    """
    for part in (config, *(own for own in config.values() if isinstance(own, dict))):
        for key, value in part.items():
            if isinstance(value, int) and value > MOST and _COUNT.fullmatch(key):
                raise CheckpointError(f"The configuration says `{key}` is {value}; more than {MOST} are not built.")


def _built(config: Mapping[str, Any]) -> nn.Module | None:
    name = architecture(config)
    if not name:
        return _component(config)
    cls = class_of(name)
    if cls is None:
        return None
    with torch.device("meta"):
        model: nn.Module = cls(cls.config_class.from_dict(without_code(config)))
    return model


def _component(config: Mapping[str, Any]) -> nn.Module | None:
    name = config.get("_class_name")
    if not isinstance(name, str) or importlib.util.find_spec("diffusers") is None:
        return None
    import diffusers

    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        return None
    with torch.device("meta"):
        model: nn.Module = cls.from_config(without_code(config))  # type: ignore[attr-defined]
    return model


def layout_of_module(model: nn.Module, origin: str, stored: Iterable[str]) -> Layout:
    """The layout of a model, some of whose tensors may be stored under other names.

    Args:
        model: With or without values.
        origin: What the layout calls its source.
        stored: The names on disk.
    """
    names = {module: name for name, module in model.named_modules()}
    uncalled = {f"{name}.{leaf}" for module, name in names.items() for leaf in _UNCALLED.get(type(module).__name__, ())}
    kinds = {
        name: kind for module, name in names.items() if (kind := kind_of(module)) is not None and name not in uncalled
    }
    any_experts = any(_EXPERTS in type(module).__name__ for module in names)
    # PEFT takes a dense or shared MLP of these names for an expert's and drops its factors in silence.
    leaves = names_of_experts(getattr(getattr(model, "config", None), "model_type", "")) if any_experts else frozenset()
    mistaken = {name: kinds.pop(name) for name in [*kinds] if name.rpartition(".")[2] in leaves}
    head = names.get(_call(model, "get_output_embeddings"))
    renamed, merged = _renamed(model, stored)
    stacks = tuple(_stacks(model, merged))
    kinds |= {unit: stack.kind for stack in stacks for unit in stack.units}
    linear_like = [kind for name, kind in kinds.items() if name != head and kind is not EMBEDDING and not kind.kernel]
    return Layout(
        origin=origin,
        kinds=kinds,
        classes={name: type(module).__name__ for module, name in names.items()},
        head=head,
        ties=_ties(model),
        prefix=f"{prefix}." if (prefix := getattr(model, "base_model_prefix", "")) and hasattr(model, prefix) else "",
        renamed=renamed,
        stacks=stacks,
        mistaken=mistaken,
        peft_takes_experts=bool(leaves),
        tokens=names.get(_call(model, "get_input_embeddings")),
        task_type=task_type(type(model).__name__, encoder_decoder=_reads_and_writes_text(model)),
        fan_in_fan_out=bool(linear_like) and all(kind.fan_in_fan_out for kind in linear_like),
    )


Parts = tuple[tuple[str, ...], ...]


def _renamed(model: nn.Module, stored: Iterable[str]) -> tuple[dict[str, str], dict[str, Parts]]:
    """How transformers 5 turns names on disk that the class does not have into those that it has.

    Returns:
        By name on disk, the model's own; and by the model's name of a stack of experts, what it is made of: for every
        expert, the tensors on disk.
    """
    own = model.state_dict()
    unknown = [name for name in stored if name not in own]
    rules = _conversions(model) if unknown else []
    if not rules:
        return {}, {}
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    stacked = {pattern for rule in converters if _stacks_experts(rule) for pattern in rule.source_patterns}
    order = [pattern for rule in converters for pattern in rule.source_patterns]
    found: dict[str, str] = {}
    parts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(unknown, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, getattr(model, "base_model_prefix", ""), own)
        # What other converters take is another tensor afterwards: split or turned.
        if renamed in own and pattern is None:
            found[name] = renamed
        elif renamed in own and pattern in stacked:
            parts[renamed][pattern].append(name)
    merged = {}
    for name, by_pattern in parts.items():
        columns = [by_pattern[pattern] for pattern in order if pattern in by_pattern]
        if all(len(column) == own[name].shape[0] for column in columns):
            merged[name] = tuple(zip(*columns, strict=True))
    return found, merged


def _conversions(model: nn.Module) -> list[Any]:
    """The rules by which transformers 5 loads a checkpoint into the model."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []  # transformers 4 has its classes under the names on disk.
    return list(get_model_conversion_mapping(model)) if isinstance(model, PreTrainedModel) else []


def _stacks_experts(rule: Any) -> bool:
    """Whether a converter does nothing but stack experts, and the parts of each along the out features."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    return steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def _stacks(model: nn.Module, merged: Mapping[str, Parts]) -> Iterator[Stack]:
    """The parameters of all experts."""
    for module_name, module in model.named_modules():
        if _EXPERTS not in type(module).__name__:
            continue
        own = {f"{module_name}.{name}": parameter for name, parameter in module.named_parameters(recurse=False)}
        if not any(parameter.ndim == 3 for parameter in own.values()):
            continue
        in_out = bool(getattr(module, "is_transposed", False))  # As PEFT asks.
        for name, parameter in own.items():
            if parameter.ndim in (2, 3):
                kind = EXPERT_IN_OUT if in_out and parameter.ndim == 3 else EXPERT
                parts = merged.get(name) or (_as_written(model, name, parameter) if parameter.ndim == 3 else ())
                yield Stack(name, tuple(parameter.shape), kind, parts)


def _as_written(model: nn.Module, name: str, parameter: Tensor) -> Parts:
    """What transformers makes of a stack when it saves it: by expert, its tensors on disk; nothing if it is one."""
    if not any(_stacks_experts(rule) for rule in _conversions(model) if hasattr(rule, "operations")):
        return ()
    from transformers.core_model_loading import revert_weight_conversion

    written = revert_weight_conversion(model, {name: torch.empty_like(parameter, device="meta")})
    names = list(written)
    if len(names) % len(parameter) or names == [name]:
        return ()
    by_expert: dict[str, list[str]] = defaultdict(list)
    for one in names:
        by_expert["".join(re.findall(r"experts\.(\d+)\.", one))].append(one)
    return tuple(tuple(by_expert[str(e)]) for e in range(len(parameter)))


def _call(model: nn.Module, method: str) -> Any:
    found = getattr(model, method, None)
    try:
        return found() if callable(found) else None
    except NotImplementedError:  # It reads no tokens.
        return None


def _ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each module whose weight others share, the others."""
    sharers: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            sharers.setdefault(owner, []).append(name)
    # On the meta device nothing is tied yet: the class tells what will be.
    declared = getattr(model, "_tied_weights_keys", None)
    if isinstance(declared, Mapping) and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        for user, owner in declared.items():
            if user not in sharers.get(owner, ()):
                sharers.setdefault(owner, []).append(user)

    def module(name: str) -> str:
        return name.removesuffix(".weight")

    return {module(owner): tuple(module(user) for user in users) for owner, users in sharers.items()}


def _reads_and_writes_text(model: nn.Module) -> bool:
    """Whether PEFT's class for encoder-decoders fits: it hands over token ids, which one that listens does not take."""
    text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    return text and bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


# Layers, by the class that holds them, of which it reads more than it calls, such as the weight or the stride: an
# adapter there has no effect, or makes it fail.
_UNCALLED: Mapping[str, tuple[str, ...]] = {
    "DebertaEncoder": ("rel_embeddings",),
    "DebertaV2Encoder": ("rel_embeddings",),
    "DetrMHAttentionMap": ("k_proj",),
    "FSMTDecoder": ("embed_tokens",),
    "FSMTEncoder": ("embed_tokens",),
    "FalconH1Mixer": ("out_proj",),
    "FalconMambaMixer": ("out_proj", "dt_proj"),
    "Glm4vMoeVisionEmbeddings": ("position_embedding",),
    "Glm4vVisionEmbeddings": ("position_embedding",),
    "JambaMambaMixer": ("dt_proj",),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LayoutLMv3Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "Mamba2Mixer": ("out_proj",),
    "MambaMixer": ("out_proj", "dt_proj"),
    "MobileNetV1ConvLayer": ("convolution",),
    "MobileNetV2ConvLayer": ("convolution",),
    "MobileBertLMPredictionHead": ("decoder", "dense"),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Qwen2AudioEncoder": ("conv1", "conv2"),
    "SEWDTransformerEncoder": ("rel_embeddings",),
    "Siglip2VisionEmbeddings": ("position_embedding",),
    "TDNNLayer": ("kernel",),
    "VoxtralEncoder": ("conv1", "conv2"),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "WhisperEncoder": ("conv1", "conv2", "embed_positions"),
}
# In the name of the class that stacks the experts of a layer.
_EXPERTS = "Experts"
