"""ComfyUI's names of what is in a model, by those of diffusers or of the authors' files.

As its `comfy/lora.py`, `comfy/utils.py` and `comfy/supported_models.py` of 2026-11 have them: a name is looked up among
those of the weights of its own model; of some models diffusers' names are known too, for weights and not for biases.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.errors import AdapterError
from peft_posthoc.formats.components import Component, old_name
from peft_posthoc.models.original import PREFIXES
from peft_posthoc.models.original_modules import FAMILIES, SWAPPED, TURNED, as_loaded, fused, is_original
from peft_posthoc.text import asked

# Of whose modules ComfyUI knows diffusers' names, or that have the same.
_AS_IN_DIFFUSERS = (
    *("SD3Transformer2DModel", "FluxTransformer2DModel", "Flux2Transformer2DModel", "ZImageTransformer2DModel"),
    *("PixArtTransformer2DModel", "AuraFlowTransformer2DModel", "QwenImageTransformer2DModel"),
    *("HiDreamImageTransformer2DModel", "Kandinsky5Transformer3DModel", "Krea2Transformer2DModel"),
)
# But of these, of Flux.2, it does not.
_BY_ORIGINAL = ("time_guidance_embed.", "double_stream_modulation_", "single_stream_modulation.")
# Of these it fuses q, k and v.
_FUSED = ("SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel")
_PARTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp")
# Whose names are the authors', where no table has others.
_ALIKE = ("LTXVideoTransformer3DModel", "ZImageTransformer2DModel")
SINGLE = "a single file"
"""The class of a model under its authors' names."""
# In files of Stable Diffusion 1.5 and XL.
_CLIP_L = re.compile(r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.(text_model\.)?")
_TEXT = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class Place(NamedTuple):
    """A weight of ComfyUI's model."""

    key: str
    """The beginning of its keys in a file."""
    modules: tuple[str, ...]
    """Those whose rows it has one below the other."""
    turned: bool = False
    """Whether its halves are the other way round."""


def of_file(deltas: AdapterOnModel) -> Component | None:
    """The model of a single file under its authors' names, which ComfyUI has too; None of another."""
    named = deltas.base.config is None and is_original(deltas.base.headers)
    return Component("diffusion_model", SINGLE, deltas) if named else None


def weight_of(part: Component, module: str) -> Place:
    """The weight that a module's is in.

    Raises:
        AdapterError: None is known.
    """
    if part.cls == SINGLE:
        return Place(_of_file(part, module), (module,))
    if part.text:
        return Place(_of_text(part, module), (module,))
    if part.cls == "UNet2DConditionModel":
        return Place(f"lora_unet_{module.replace('.', '_')}", (module,))
    if part.cls in _AS_IN_DIFFUSERS and not module.startswith(_BY_ORIGINAL):
        return Place(f"transformer.{module}", (module,))
    if (found := original_of(part, module)) is not None:
        return found
    raise AdapterError(
        f"ComfyUI's name of `{module}` of `{part.cls}` is not known here. Known are UNet2DConditionModel, "
        f"{', '.join(dict.fromkeys((*_AS_IN_DIFFUSERS, *FAMILIES)))}, CLIP and T5. Use `{asked('to', 'merged')}`."
    )


def bias_of(part: Component, module: str) -> Place:
    """The weight beside which ComfyUI looks for a bias: a whole one.

    Raises:
        AdapterError: None is known.
    """
    found, is_part = original_of(part, module), part.cls in _FUSED and module.endswith(_PARTS)
    if not is_part and not (found and found.turned):
        return weight_of(part, module)
    if found is None:
        raise AdapterError(
            f"ComfyUI adds nothing to a part of a fused bias (`{module}.bias`), and the name of the whole is not known "
            f"here. Use `{asked('to', 'merged')}`."
        )
    return found


def parameter_of(part: Component, name: str) -> str:
    """The key of a parameter that is no module's weight or bias.

    Raises:
        AdapterError: None is known.
    """
    if part.cls == SINGLE:
        module, _, leaf = name.rpartition(".")
        return _of_file(part, module if leaf == "scale" else name)  # Flux' norms, which ComfyUI calls `.weight`.
    if (found := original_of(part, name)) is not None:
        return found.key
    raise AdapterError(
        f"ComfyUI's name of `{name}` of `{part.cls}` is not known here. Leave it out when you extract "
        f"(`{asked('exclude', name.rpartition('.')[2])}`), or use `{asked('to', 'merged')}`."
    )


def original_of(part: Component, name: str) -> Place | None:
    """The weight that a module's is in, or a parameter, by its authors' name."""
    last = int((part.deltas.base.config or {}).get("num_layers", 0)) - 1
    for original, modules in (fused(part.cls, [name]) if part.cls in FAMILIES else {}).items():
        turned = (SWAPPED, f"joint_blocks.{last}.context_block.adaLN_modulation.1")
        return Place(f"diffusion_model.{original}", modules, part.cls in TURNED and original in turned)
    return Place(f"diffusion_model.{name}", (name,)) if part.cls in _ALIKE else None


def _of_text(part: Component, module: str) -> str:
    clip = "t5xxl" if part.cls.startswith("T5") else _TEXT.get(part.name)
    if part.cls == "CLIPTextModel" and (part.deltas.base.config or {}).get("hidden_size") == 1024:
        clip = "clip_h"
    if clip is None or not part.cls.startswith(("CLIPText", "T5")):
        raise AdapterError(f"ComfyUI's names for the text encoder `{part.deltas.base.label}` are not known here.")
    return f"text_encoders.{clip}.transformer.{old_name(part, module)}"


def _of_file(part: Component, module: str) -> str:
    """The key of what a file has under its authors' name.

    Raises:
        AdapterError: It is of another component, whose names are not known.
    """
    headers = part.deltas.base.headers
    if (text := _CLIP_L.match(module)) is not None:
        return f"text_encoders.clip_l.transformer.text_model.{module[text.end() :]}"
    prefix = next((one for one in PREFIXES if any(name.startswith(one) for name in headers)), "")
    if not module.startswith(prefix):
        raise AdapterError(
            f"The name of `{module}` in `{part.deltas.base.label}` in such a file is not known here. Leave it out when "
            f"you extract (`{asked('include', '^(model.)?diffusion_model')}`), or give the components' folders as base."
        )
    return f"diffusion_model.{as_loaded(module.removeprefix(prefix), headers)}"
