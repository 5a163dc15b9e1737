"""The layout of a model that is there, with or without values: its modules know what its weights are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from peft_posthoc.models.config import auto_mapping, task_type
from peft_posthoc.models.conversions import loading, written
from peft_posthoc.models.kinds import EMBEDDING, EXPERT, EXPERT_IN_OUT, LayerKind, kind_of
from peft_posthoc.models.layout import Layout, Stack
from peft_posthoc.models.peft_experts import names_of_experts


def layout_of_module(model: nn.Module, origin: str, files: Iterable[Collection[str]]) -> Layout:
    """The layout of a model, some of whose tensors may be stored under other names, or in other pieces.

    Args:
        model: With or without values.
        origin: What the layout calls its source.
        files: Of each checkpoint, the names of its tensors.
    """
    files = [*files]
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
    stacked = _stacked_parameters(model)
    renamed, parts, conversions = loading(model, files, stacked)
    stacks = tuple(
        Stack(
            name,
            tuple(parameter.shape),
            kind,
            parts.get(name) or (written(model, name, parameter) if parameter.ndim == 3 else ()),
        )
        for name, (parameter, kind) in stacked.items()
    )
    kinds |= {unit: stack.kind for stack in stacks for unit in stack.units}
    linear_like = [kind for name, kind in kinds.items() if name != head and kind is not EMBEDDING and not kind.kernel]
    task = task_type(type(model).__name__, encoder_decoder=_reads_and_writes_text(model))
    layout = Layout(
        origin=origin,
        kinds=kinds,
        classes={name: type(module).__name__ for module, name in names.items()},
        head=head,
        ties=_ties(model),
        prefix=f"{prefix}." if (prefix := getattr(model, "base_model_prefix", "")) and hasattr(model, prefix) else "",
        renamed=renamed,
        conversions=conversions,
        stacks=stacks,
        mistaken=mistaken,
        peft_takes_experts=bool(leaves),
        tokens=names.get(_call(model, "get_input_embeddings")),
        task_type=task,
        auto_mapping=auto_mapping(type(model)) if task is None else None,
        fan_in_fan_out=bool(linear_like) and all(kind.fan_in_fan_out for kind in linear_like),
    )
    return replace(
        layout, unread=frozenset(_unread(model, {layout.name_of(name) for names in files for name in names}))
    )


def _unread(model: nn.Module, names: Collection[str]) -> set[str]:
    """The names of tensors that the class passes over in silence: it has none, or makes it when it is built."""
    stored = model.state_dict().keys()
    made = {name for name, _ in model.named_buffers()} - stored
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq"]
    found = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    return {name for name in names if name not in stored and (name in made or found.search(name))}


def _stacked_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, LayerKind]]:
    """The parameters of all experts."""
    found: dict[str, tuple[nn.Parameter, LayerKind]] = {}
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False)) if _EXPERTS in type(module).__name__ else {}
        if not any(parameter.ndim == 3 for parameter in own.values()):
            continue
        in_out = bool(getattr(module, "is_transposed", False))  # As PEFT asks.
        for name, parameter in own.items():
            if parameter.ndim in (2, 3):
                kind = EXPERT_IN_OUT if in_out and parameter.ndim == 3 else EXPERT
                found[f"{module_name}.{name}"] = parameter, kind
    return found


def _call(model: nn.Module, method: str) -> Any:
    found = getattr(model, method, None)
    try:
        return found() if callable(found) else None
    except NotImplementedError:  # It reads no tokens.
        return None


def _ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each module whose weight others share, the others; of what is no weight, the same by its own name."""
    # On the meta device nothing is tied yet: the class tells what will be.
    expanded = getattr(model, "get_expanded_tied_weights_keys", None)
    declared: dict[str, str] = {} if expanded is None else expanded(all_submodels=True)
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    owner_of: dict[str, str] = {}
    for names in groups.values():
        owner = next((name for name in names if name in {*declared.values()}), names[0])
        owner_of |= {name: owner for name in names if name != owner}
    ties: dict[str, tuple[str, ...]] = {}
    for user, owner in {**owner_of, **{user: owner_of.get(user, owner) for user, owner in declared.items()}}.items():
        module = owner.removesuffix(".weight")
        ties[module] = (*ties.get(module, ()), user.removesuffix(".weight"))
    return ties


def _reads_and_writes_text(model: nn.Module) -> bool:
    """Tell whether PEFT's class for encoder-decoders fits: it hands over token ids, which one that listens refuses."""
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
