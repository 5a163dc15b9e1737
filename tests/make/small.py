"""A small model of each of a library's classes: every configuration shrunk by the names of its fields."""

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# A model of more parameters than this is not small: of it the recipe below missed a size.
LARGEST = 4_000_000
# What a class needs beyond the recipe, by its configuration's model type.
EXTRAS: Mapping[str, Mapping[str, Any]] = json.loads(Path(__file__).with_name("small.json").read_text())

# The first whose expression is found in a field's name tells its size.
_SIZES = [
    (r"(^|_)(token|pad|bos|eos|sep|cls|mask|unk|image|video|audio|boi|eoi|boa|eoa|start|end)_(token_)?(id|index)$", 90),
    (r"vocab", 96),
    (r"(key_value|kv).*heads", 2),
    (r"heads|^n_head$|head_count|linear_num_(key|value)_heads", 4),
    (r"head_dim|dim_head|^d_kv$|head_size|nope_dim|rope_dim|v_head", 8),
    (r"experts_per_tok|top_?k|moe_k", 1),
    (r"shared_experts", 1),
    (r"num_(local_|routed_)?experts$|n_routed_experts|num_experts", 2),
    (r"lora_rank|state_size|d_state|lora_dim", 8),
    (r"layers$|^n_layer$|depth$|num_.*blocks?$|^layers$|num_self_attends", 2),
    (r"patch_size|patch_length", 8),
    (r"image_size|input_size|max_length|img_size", 32),
    (r"position|context_length|n_ctx|seq_len|max_source|max_target", 64),
    (r"intermediate|ffn|inner|mlp_dim|d_ff|feedforward|linear_units", 48),
    (r"codebook_size|num_embeds|num_embeddings|classes|labels|num_buckets|num_queries|num_denoising|num_latents", 16),
    (r"size|dim|width|channels|d_model|n_embd|units|filters|features|emb", 32),
]
# Not sizes of a matrix that grows, or already small.
_KEPT = r"kernel|stride|num_channels|in_channels|window|ratio|factor|merge|chunk|rate$|n_group|topk_group|compress"


class NotBuilt(Exception):
    """There is no small model of a class."""


def shrunk(name: str, value: int) -> int:
    """A size, or a token's number, that is small; never more than it was."""
    if re.search(_KEPT, name) and value <= 64:
        return value
    found = next((size for pattern, size in _SIZES if re.search(pattern, name)), 64)
    return min(value, found) if value > 0 else value


def small(config: Any, more: Mapping[str, Any] = {}) -> Any:
    """A configuration like this one, with every size shrunk, and those of its parts.

    Args:
        config: As its class makes it of nothing.
        more: Fields that have other values; `part.name` is one of a part.
    """
    kind = type(config)
    extras = {**EXTRAS.get(kind.model_type, {}), **more}
    made: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in kind.sub_configs:
            part = getattr(config, field.name)
            own = {name.partition(".")[2]: v for name, v in extras.items() if name.startswith(f"{field.name}.")}
            made[field.name] = part if part is None else small(part, own)
            continue
        default = field.default if field.default is not dataclasses.MISSING else None
        if isinstance(default, bool) or field.name in _COMMON:
            continue
        if isinstance(default, int):
            made[field.name] = shrunk(field.name, default)
        elif isinstance(default, list | tuple) and default and all(type(one) is int for one in default):
            made[field.name] = type(default)(_of_list(field.name, one) for one in default)
    return kind(**{**made, **{name: value for name, value in extras.items() if "." not in name}})


def _of_list(name: str, value: int) -> int:
    if re.search("depths|num_blocks|num_layers|layer_depth|^layers$|blocks_per", name):
        return min(value, 1)
    if re.search("heads|num_attention", name):
        return min(value, 2)
    if re.search("dim|size|channels|width|hidden|filters|planes", name) and not re.search(_KEPT + "|patch|image", name):
        return min(value, 32)
    return value


_COMMON = {"chunk_size_feed_forward", "transformers_version"}


def of_signature(cls: type) -> dict[str, Any]:
    """The arguments of a small model of diffusers, by the names and defaults of its parameters."""
    made: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        value = parameter.default
        if isinstance(value, bool) or name in ("self", "in_channels", "out_channels"):
            continue
        if re.search("norm.*groups|num_groups", name):
            made[name] = 4
        elif name == "cross_attention_dim" or (value is None and re.search("(caption|joint).*dim", name)):
            made[name] = 32
        elif isinstance(value, int):
            made[name] = shrunk(name, value)
        elif isinstance(value, list | tuple) and value and all(type(one) is int for one in value):
            made[name] = type(value)(_of_list(name, one) for one in value)
    return {**made, **EXTRAS.get(cls.__name__, {})}


def classes() -> list[str]:
    """The model classes of transformers, one for each configuration (that with the most parts), and of diffusers."""
    import diffusers
    from transformers.models.auto import configuration_auto, modeling_auto

    kinds = [name for name in vars(modeling_auto) if re.fullmatch(r"MODEL_.*MAPPING_NAMES", name)]
    first = ["ZERO_SHOT_IMAGE", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM", "SEQ_TO_SEQ", "SPEECH_SEQ"]
    first += ["MASKED_LM", "CTC", "IMAGE_CLASSIFICATION"]
    order = {kind: next((i for i, part in enumerate(first) if part in kind), len(first)) for kind in kinds}
    order["MODEL_MAPPING_NAMES"] = len(first) + 1
    kinds.sort(key=order.__getitem__)
    found = []
    for model_type in configuration_auto.CONFIG_MAPPING_NAMES:
        names = [name for kind in kinds if (name := getattr(modeling_auto, kind).get(model_type))]
        found += [name if isinstance(name, str) else name[0] for name in names[:1]]
    # Not those that are made of others, nor any that has another name.
    ours = (name for name in sorted(dir(diffusers)) if re.search(r"Model$|Net$|^Autoencoder|^VQ|Transformer", name))
    found += [name for name in ours if "Multi" not in name and _is_model(getattr(diffusers, name, None))]
    return list(dict.fromkeys(found))


def _is_model(one: Any) -> bool:
    import diffusers

    return isinstance(one, type) and issubclass(one, diffusers.ModelMixin) and one is not diffusers.ModelMixin


def kind(name: str) -> Any:
    """A class by its name, of diffusers where transformers has none."""
    import transformers

    if hasattr(transformers, name):
        return getattr(transformers, name)
    import diffusers

    return getattr(diffusers, name)


def make(name: str) -> torch.nn.Module:
    """A small model of this class.

    Raises:
        NotBuilt: It needs what is not installed, or more than the recipe knows.
    """
    try:
        with torch.device("meta"):
            size = sum(values.numel() for values in _made(name).parameters())
        if size <= LARGEST:
            return _made(name).eval()
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]) from error
    raise NotBuilt(f"{size:,} parameters")


def _made(name: str) -> torch.nn.Module:
    cls = kind(name)
    return cls(small(cls.config_class())) if hasattr(cls, "config_class") else cls(**of_signature(cls))
