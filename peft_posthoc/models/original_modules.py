"""Modules of image and video models by the names of their authors' code, each made of one or more of diffusers'.

ComfyUI and kohya's scripts call modules so where they fuse what diffusers keeps apart. The rows of a fused module are
those of its parts, one below the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

import torch
from torch import Tensor

# The original's name and, from top to bottom, those of diffusers; `#` is a number, the same in all.
_FLUX = {
    "double_blocks.#.img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "double_blocks.#.txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "double_blocks.#.img_attn.proj": ("attn.to_out.0",),
    "double_blocks.#.txt_attn.proj": ("attn.to_add_out",),
    "double_blocks.#.img_attn.norm.query_norm": ("attn.norm_q",),
    "double_blocks.#.img_attn.norm.key_norm": ("attn.norm_k",),
    "double_blocks.#.txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "double_blocks.#.txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "double_blocks.#.img_mlp.0": ("ff.net.0.proj",),
    "double_blocks.#.img_mlp.2": ("ff.net.2",),
    "double_blocks.#.txt_mlp.0": ("ff_context.net.0.proj",),
    "double_blocks.#.txt_mlp.2": ("ff_context.net.2",),
    "double_blocks.#.img_mod.lin": ("norm1.linear",),
    "double_blocks.#.txt_mod.lin": ("norm1_context.linear",),
    "single_blocks.#.linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "single_blocks.#.linear2": ("proj_out",),
    "single_blocks.#.norm.query_norm": ("attn.norm_q",),
    "single_blocks.#.norm.key_norm": ("attn.norm_k",),
    "single_blocks.#.modulation.lin": ("norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    **{
        f"{original}.{layer}": (f"time_text_embed.{own}_embedder.linear_{number}",)
        for original, own in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance"))
        for layer, number in (("in_layer", 1), ("out_layer", 2))
    },
}
_SD3 = {
    f"joint_blocks.#.{side}.{original}": owns
    for side, original, owns in (
        ("x_block", "attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
        ("x_block", "attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
        ("context_block", "attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        ("x_block", "attn.proj", ("attn.to_out.0",)),
        ("x_block", "attn2.proj", ("attn2.to_out.0",)),
        ("context_block", "attn.proj", ("attn.to_add_out",)),
        ("x_block", "mlp.fc1", ("ff.net.0.proj",)),
        ("x_block", "mlp.fc2", ("ff.net.2",)),
        ("context_block", "mlp.fc1", ("ff_context.net.0.proj",)),
        ("context_block", "mlp.fc2", ("ff_context.net.2",)),
        ("x_block", "adaLN_modulation.1", ("norm1.linear",)),
        ("context_block", "adaLN_modulation.1", ("norm1_context.linear",)),  # Of the last block with halves swapped.
    )
} | {"final_layer.adaLN_modulation.1": ("norm_out.linear",), "final_layer.linear": ("proj_out",)}
_WAN = {
    **{
        f"blocks.#.{original}.{leaf}": (f"{own}.{name}",)
        for original, own in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for leaf, name in (
            *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
            *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
        )
    },
    "blocks.#.cross_attn.k_img": ("attn2.add_k_proj",),
    "blocks.#.cross_attn.v_img": ("attn2.add_v_proj",),
    "blocks.#.cross_attn.norm_k_img": ("attn2.norm_added_k",),
    "blocks.#.ffn.0": ("ffn.net.0.proj",),
    "blocks.#.ffn.2": ("ffn.net.2",),
    "blocks.#.norm3": ("norm2",),
    **{
        f"img_emb.{original}": (f"condition_embedder.image_embedder.{own}",)
        for original, own in (
            *(("proj.0", "norm1"), ("proj.1", "ff.net.0.proj"), ("proj.3", "ff.net.2"), ("proj.4", "norm2")),
            ("emb_pos", "pos_embed"),
        )
    },
    "blocks.#.modulation": ("scale_shift_table",),
    "head.modulation": ("scale_shift_table",),
    "patch_embedding": ("patch_embedding",),
    "head.head": ("proj_out",),
    "time_projection.1": ("condition_embedder.time_proj",),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
}
_FLUX2 = {
    **{
        name: parts
        for name, parts in _FLUX.items()
        if re.match(r"double_blocks.*attn|single_blocks.*_norm|(img|txt)_in|final", name)
    },
    **{
        f"double_blocks.#.{side}_mlp.{number}": (f"{own}.linear_{leaf}",)
        for side, own in (("img", "ff"), ("txt", "ff_context"))
        for number, leaf in ((0, "in"), (2, "out"))
    },
    "single_blocks.#.linear1": ("attn.to_qkv_mlp_proj",),
    "single_blocks.#.linear2": ("attn.to_out",),
    **{
        f"{name}.lin": (f"{name}.linear",)
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    },
    **{
        f"{original}.{layer}": (f"time_guidance_embed.{own}_embedder.linear_{number}",)
        for original, own in (("time_in", "timestep"), ("guidance_in", "guidance"))
        for layer, number in (("in_layer", 1), ("out_layer", 2))
    },
}
# As ComfyUI calls them, which makes the names of the authors' files those of Flux where it can.
_HUNYUAN = {
    **{name: parts for name, parts in _FLUX.items() if name not in ("img_in", "txt_in")},
    "img_in.proj": ("x_embedder.proj",),
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    **{
        f"txt_in.{original}.{layer}": (f"context_embedder.time_text_embed.{own}_embedder.linear_{number}",)
        for original, own in (("t_embedder", "timestep"), ("c_embedder", "text"))
        for layer, number in (("in_layer", 1), ("out_layer", 2))
    },
    "txt_in.individual_token_refiner.blocks.#.self_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    **{
        f"txt_in.individual_token_refiner.blocks.#.{original}": (own,)
        for original, own in (
            *(("self_attn.proj", "attn.to_out.0"), ("adaLN_modulation.1", "norm_out.linear")),
            *(("mlp.0", "ff.net.0.proj"), ("mlp.2", "ff.net.2"), ("norm1", "norm1"), ("norm2", "norm2")),
        )
    },
}
# Names in the authors' file of HunyuanVideo.
_OF_HUNYUAN = (
    (r"(txt_in\.[tc]_embedder|(time|vector|guidance)_in)\.(mlp\.0|linear_1)$", r"\1.in_layer"),
    (r"(txt_in\.[tc]_embedder|(time|vector|guidance)_in)\.(mlp\.2|linear_2)$", r"\1.out_layer"),
    (r"(_mod|\.modulation)\.linear$", r"\1.lin"),
    (r"_attn_(qkv|proj)$", r"_attn.\1"),
    (r"mlp\.fc1$", "mlp.0"),
    (r"mlp\.fc2$", "mlp.2"),
    (r"(_attn)_q_norm$|\.q_norm$", r"\1.norm.query_norm"),
    (r"(_attn)_k_norm$|\.k_norm$", r"\1.norm.key_norm"),
)
# Everything else has the same names there.
_LTX = {
    "patchify_proj": ("proj_in",),
    **{
        f"adaln_single.{name}": (f"time_embed.{name}",)
        for name in ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
    },
    **{
        f"transformer_blocks.#.attn{number}.{leaf}_norm": (f"attn{number}.norm_{leaf}",)
        for number in (1, 2)
        for leaf in "qk"
    },
}
_Z_IMAGE = {
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    **{
        f"{blocks}.#.attention.{original}": tuple(f"attention.{own}" for own in owns)
        for blocks in ("layers", "noise_refiner", "context_refiner")
        for original, owns in (
            *(("qkv", ("to_q", "to_k", "to_v")), ("out", ("to_out.0",))),
            *(("q_norm", ("norm_q",)), ("k_norm", ("norm_k",))),
        )
    },
}
# The beginning of the original's numbered modules, and diffusers' where it has another.
_BLOCKS = {
    "double_blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks",
    "joint_blocks": "transformer_blocks",
    "txt_in.individual_token_refiner.blocks": "context_embedder.token_refiner.refiner_blocks",
}

FAMILIES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "FluxTransformer2DModel": _FLUX,
    "SD3Transformer2DModel": _SD3,
    "WanTransformer3DModel": _WAN,
    "Flux2Transformer2DModel": _FLUX2,
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "LTXVideoTransformer3DModel": _LTX,
    "ZImageTransformer2DModel": _Z_IMAGE,
}
"""By diffusers' class, its table."""

SWAPPED = "final_layer.adaLN_modulation.1"
"""An original whose halves, shift and scale, are the other way round in diffusers' `norm_out.linear`."""
_ORIGINAL = re.compile(
    r"(model\.)?diffusion_model\.|(input|double|single|joint|transformer)_blocks\.\d+\.|blocks\.\d+\.self_attn\."
    r"|noise_refiner\."
)
TURNED = (
    *("FluxTransformer2DModel", "Flux2Transformer2DModel", "SD3Transformer2DModel"),
    "HunyuanVideoTransformer3DModel",
)
"""The families with it."""


def parts_of(original: str, family: str, underscored: bool = False) -> tuple[str, ...]:
    """The modules of diffusers that one of an original is made of; none where it is not in the table.

    Args:
        original: Its name.
        family: Diffusers' class, one of `FAMILIES`.
        underscored: Whether its dots were made underscores.
    """
    general, number = _general(original, underscored)
    for name, parts in FAMILIES[family].items():
        if (name.replace(".", "_") if underscored else name) in (general, original):
            return _named(name, parts, number)
    return ()


def family_of(originals: Mapping[str, bool], widening: int | None) -> str | None:
    """The class of diffusers that modules are of by their authors' names; None where they are by no such names.

    Args:
        originals: By name, whether dots were made underscores.
        widening: How many times as many rows as columns the first layer of single blocks or of MLPs has, if known:
            Flux and Flux.2 have different modules of the same names.
    """
    general = {_general(name, underscored)[0]: underscored for name, underscored in originals.items()}
    begun = {name.partition("#")[0].rstrip("._") for name in general if "#" in name}
    counts = {
        family: sum(name in _names(family, underscored) for name, underscored in general.items())
        for family in FAMILIES
        if not begun or not begun.isdisjoint(_beginnings(family))
    }
    wide = "Flux2Transformer2DModel" if widening in (6, 9) else ""
    found = max(counts, key=lambda family: (counts[family], family == wide), default="")
    return found if counts.get(found) else None


def is_original(names: Iterable[str]) -> bool:
    """Whether a file is of an image or video model under its authors' names, or has one in it."""
    return any(_ORIGINAL.match(name) for name in names)


@cache
def _beginnings(family: str) -> frozenset[str]:
    """What the names of blocks begin with, with dots and with underscores."""
    dotted = {name.partition(".#")[0] for name in FAMILIES[family] if "#" in name}
    return frozenset(dotted | {name.replace(".", "_") for name in dotted})


@cache
def _names(family: str, underscored: bool) -> frozenset[str]:
    return frozenset(name.replace(".", "_") if underscored else name for name in FAMILIES[family])


def _general(original: str, underscored: bool) -> tuple[str, str]:
    """A name with `#` for the number of its block, and the number; as it is and nothing where it has none."""
    number = re.search(r"(?<=_)\d+(?=_)" if underscored else r"(?<=\.)\d+(?=\.)", original)
    if number is None:
        return original, ""
    return f"{original[: number.start()]}#{original[number.end() :]}", number[0]


def fused(family: str, modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The modules of the original that these of diffusers are in, each with all of its parts.

    Args:
        family: Diffusers' class, one of `FAMILIES`.
        modules: By diffusers' names; those without an original are left out.
    """
    found: dict[str, tuple[str, ...]] = {}
    for module in modules:
        _, number = _general(module, underscored=False)
        for name, parts in FAMILIES[family].items():
            own = _named(name, parts, number)
            if module in own:
                found[name.replace("#", number)] = own
    return found


def as_loaded(module: str, beside: Iterable[str]) -> str:
    """ComfyUI's name of a module by its authors' name, which it changes when it loads a file of HunyuanVideo.

    Args:
        module: Its name.
        beside: The names of all tensors in the file.
    """
    if any("individual_token_refiner" in name for name in beside):
        for pattern, new in _OF_HUNYUAN:
            module = re.sub(pattern, new, module)
    return module


def swapped(rows: Tensor) -> Tensor:
    """The halves the other way round."""
    return torch.cat(rows.chunk(2)[::-1])


def _named(name: str, parts: tuple[str, ...], number: str) -> tuple[str, ...]:
    first, dot, _ = name.partition(".#.")
    return tuple(f"{_BLOCKS.get(first, first)}.{number}.{part}" for part in parts) if dot else parts
