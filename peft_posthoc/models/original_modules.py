"""Modules of image and video models by the names of their authors' code, each made of one or more of diffusers'.

ComfyUI and kohya's scripts call modules so where they fuse what diffusers keeps apart. The rows of a fused module are
those of its parts, one below the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

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
    **{
        f"{original}.{layer}": (f"time_text_embed.{own}_embedder.linear_{number}",)
        for original, own in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance"))
        for layer, number in (("in_layer", 1), ("out_layer", 2))
    },
}
# Not here: `norm_out.linear` and the last block's `norm1_context.linear`, whose halves are swapped.
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
    )
}
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
    "patch_embedding": ("patch_embedding",),
    "head.head": ("proj_out",),
    "time_projection.1": ("condition_embedder.time_proj",),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
}
# The beginning of the original's numbered modules, and diffusers'.
_BLOCKS = {
    "double_blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks",
    "joint_blocks": "transformer_blocks",
    "blocks": "blocks",
}

FAMILIES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "FluxTransformer2DModel": _FLUX,
    "SD3Transformer2DModel": _SD3,
    "WanTransformer3DModel": _WAN,
}
"""By diffusers' class, its table."""


def parts_of(original: str, underscored: bool = False) -> tuple[str, ...]:
    """The modules of diffusers that one of an original is made of; none where it is in no table.

    Args:
        original: Its name.
        underscored: Whether its dots were made underscores.
    """
    number = re.search(r"(?<=_)\d+(?=_)" if underscored else r"(?<=\.)\d+(?=\.)", original)
    general = original if number is None else f"{original[: number.start()]}#{original[number.end() :]}"
    for table in FAMILIES.values():
        for name, parts in table.items():
            if (name.replace(".", "_") if underscored else name) in (general, original):
                return _named(name, parts, number[0] if number else "")
    return ()


def fused(family: str, modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The modules of the original that these of diffusers are in, each with all of its parts.

    Args:
        family: Diffusers' class, one of `FAMILIES`.
        modules: By diffusers' names; those without an original are left out.
    """
    found: dict[str, tuple[str, ...]] = {}
    for module in modules:
        number = re.search(r"(?<=\.)\d+(?=\.)", module)
        for name, parts in FAMILIES[family].items():
            own = _named(name, parts, number[0] if number else "")
            if module in own:
                found[name.replace("#", number[0]) if number else name] = own
    return found


def _named(name: str, parts: tuple[str, ...], number: str) -> tuple[str, ...]:
    first, dot, _ = name.partition(".#.")
    return tuple(f"{_BLOCKS[first]}.{number}.{part}" for part in parts) if dot else parts
