"""The names that diffusers' components had before: which tensors of a class each original tensor is made of.

diffusers has converters in one direction only. `originals(class_name, headers)` goes the other way, to make single
files; every line, and those of `models/original_modules.py`, is held against diffusers' own converter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.view import Piece
from peft_posthoc.models.original_modules import FAMILIES, SWAPPED, TURNED, fused, swapped

Names = Mapping[str, tuple[str, ...]]
"""By an original module or parameter, those of the class that it has one above the other. `{}` is a number."""


def _of(block: str, within: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The names within a block, which both begin otherwise: `ORIGINAL=CLASS`."""
    before, _, after = block.partition("=")
    return {f"{before}{old}": tuple(f"{after}{new}" for new in news.split()) for old, news in within.items()}


_IMAGE, _TEXT = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_EMBEDDERS = {
    "time_in.in_layer": "timestep_embedder.linear_1",
    "time_in.out_layer": "timestep_embedder.linear_2",
    "guidance_in.in_layer": "guidance_embedder.linear_1",
    "guidance_in.out_layer": "guidance_embedder.linear_2",
}
_POOLED = {"vector_in.in_layer": "text_embedder.linear_1", "vector_in.out_layer": "text_embedder.linear_2"}
_HEAD = {"final_layer.adaLN_modulation.1": "norm_out.linear", "final_layer.linear": "proj_out"}
_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_DOUBLE_FLUX = {
    "img_attn.qkv": _IMAGE,
    "txt_attn.qkv": _TEXT,
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
_SD3 = {
    **_of("=", {"pos_embed": "pos_embed.pos_embed", "x_embedder.proj": "pos_embed.proj", **_HEAD}),
    **_of(
        "=time_text_embed.",
        {
            "t_embedder.mlp.0": "timestep_embedder.linear_1",
            "t_embedder.mlp.2": "timestep_embedder.linear_2",
            "y_embedder.mlp.0": "text_embedder.linear_1",
            "y_embedder.mlp.2": "text_embedder.linear_2",
        },
    ),
    **_of(
        "joint_blocks.{}.x_block.=transformer_blocks.{}.",
        {
            "attn.ln_q": "attn.norm_q",
            "attn.ln_k": "attn.norm_k",
            "attn2.ln_q": "attn2.norm_q",
            "attn2.ln_k": "attn2.norm_k",
        },
    ),
    **_of(
        "joint_blocks.{}.context_block.=transformer_blocks.{}.",
        {
            "attn.ln_q": "attn.norm_added_q",
            "attn.ln_k": "attn.norm_added_k",
            "adaLN_modulation.1": "norm1_context.linear",
        },
    ),
}
_HUNYUAN = {
    **_of("=", {"img_in.proj": "x_embedder.proj", "txt_in.input_embedder": "context_embedder.proj_in", **_HEAD}),
    **_of(
        "=time_text_embed.",
        {
            **_POOLED,
            "time_in.mlp.0": "timestep_embedder.linear_1",
            "time_in.mlp.2": "timestep_embedder.linear_2",
            "guidance_in.mlp.0": "guidance_embedder.linear_1",
            "guidance_in.mlp.2": "guidance_embedder.linear_2",
        },
    ),
    **_of(
        "txt_in.=context_embedder.time_text_embed.",
        {
            "t_embedder.mlp.0": "timestep_embedder.linear_1",
            "t_embedder.mlp.2": "timestep_embedder.linear_2",
            "c_embedder.linear_1": "text_embedder.linear_1",
            "c_embedder.linear_2": "text_embedder.linear_2",
        },
    ),
    **_of(
        "txt_in.individual_token_refiner.blocks.{}.=context_embedder.token_refiner.refiner_blocks.{}.",
        {
            "self_attn_qkv": _IMAGE,
            "self_attn_proj": "attn.to_out.0",
            "adaLN_modulation.1": "norm_out.linear",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "norm1": "norm1",
            "norm2": "norm2",
        },
    ),
    **_of(
        "double_blocks.{}.=transformer_blocks.{}.",
        {
            "img_attn_qkv": _IMAGE,
            "txt_attn_qkv": _TEXT,
            "img_attn_q_norm": "attn.norm_q",
            "img_attn_k_norm": "attn.norm_k",
            "txt_attn_q_norm": "attn.norm_added_q",
            "txt_attn_k_norm": "attn.norm_added_k",
            "img_attn_proj": "attn.to_out.0",
            "txt_attn_proj": "attn.to_add_out",
            "img_mod.linear": "norm1.linear",
            "txt_mod.linear": "norm1_context.linear",
            "img_mlp.fc1": "ff.net.0.proj",
            "img_mlp.fc2": "ff.net.2",
            "txt_mlp.fc1": "ff_context.net.0.proj",
            "txt_mlp.fc2": "ff_context.net.2",
        },
    ),
    **_of(
        "single_blocks.{}.=single_transformer_blocks.{}.",
        {
            "linear1": f"{_IMAGE} proj_mlp",
            "linear2": "proj_out",
            "modulation.linear": "norm.linear",
            "q_norm": "attn.norm_q",
            "k_norm": "attn.norm_k",
        },
    ),
}
# Beside what `original_modules` has.
TABLES: Mapping[str, Names] = {
    "FluxTransformer2DModel": {},
    "Flux2Transformer2DModel": {},
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "LTXVideoTransformer3DModel": {},
    "QwenImageTransformer2DModel": {},  # The names are the original ones.
    "SD3Transformer2DModel": _SD3,
    "WanTransformer3DModel": {},
    "ZImageTransformer2DModel": {},
}
# Its halves are the other way round too.
_LAST_OF_SD3 = "joint_blocks.{}.context_block.adaLN_modulation.1"


def originals(class_name: str, headers: Mapping[str, Header]) -> dict[str, Piece]:
    """By its original name, what each tensor is made of: its sources by the class's names, one above the other.

    `make` takes whatever has the rows of the weights, be it the weight, its delta, or a factor `b`.

    Args:
        class_name: One of `TABLES`.
        headers: Of the component, by the class's names.
    """
    whole = [
        (re.compile(re.escape(new).replace(r"\{\}", r"(\d+)")), old, news)
        for old, news in TABLES[class_name].items()
        for new in news
    ]
    last = max((int(name.split(".")[1]) for name in headers if name.startswith("transformer_blocks.")), default=0)
    halves = {SWAPPED} if class_name in TURNED else set()
    if class_name == "SD3Transformer2DModel":
        halves.add(_LAST_OF_SD3.format(last))
    found: dict[str, Piece] = {}
    for name, header in headers.items():
        module, leaf = _parted(name)
        old: str = module
        parts: tuple[str, ...] = (module,)
        if class_name in FAMILIES and (known := fused(class_name, [module])):
            ((old, parts),) = known.items()
        for pattern, before, news in whole:
            if match := pattern.fullmatch(module):
                old, parts = before.format(*match.groups()), tuple(new.format(*match.groups()) for new in news)
        sources = tuple(_joined(part, leaf) for part in parts)
        if name == sources[0] and headers.keys() >= {*sources}:
            rows = sum(headers[source].shape[0] for source in sources)
            own = "scale" if class_name.startswith("Flux") and old.endswith(("query_norm", "key_norm")) else leaf
            found[_joined(old, own)] = Piece(
                sources, Header((rows, *header.shape[1:]), header.dtype), swapped if old in halves else _stacked
            )
    return found


def _parted(name: str) -> tuple[str, str]:
    module, _, leaf = name.rpartition(".")
    return (module, leaf) if leaf in ("weight", "bias") else (name, "")


def _joined(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if leaf else module


def _stacked(*tensors: Tensor) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
