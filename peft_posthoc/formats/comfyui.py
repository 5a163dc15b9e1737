"""A LoRA file for ComfyUI, exact: what has no factors is in it as a difference (`.diff`, `.diff_b`).

Read in its `comfy/lora.py` of 2026-11: a name is looked up among those of the model's weights; where diffusers' module
is a part of a fused one, factors are added to its rows, and a difference of its bias is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_posthoc.adapters.factors import Factors
from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.errors import AdapterError
from peft_posthoc.formats.components import Component, components, filed, old_name, summands
from peft_posthoc.formats.kohya import lora
from peft_posthoc.formats.result import Exported, Out
from peft_posthoc.formats.single_file import account, metadata_of, write_file
from peft_posthoc.models.original import PREFIXES
from peft_posthoc.models.original_modules import FAMILIES, SWAPPED, fused, swapped
from peft_posthoc.progress import progress_bar
from peft_posthoc.text import asked

# Whose modules ComfyUI finds by diffusers' names, or that have the same.
_AS_IN_DIFFUSERS = (
    *("SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel", "AuraFlowTransformer2DModel"),
    *("QwenImageTransformer2DModel", "ZImageTransformer2DModel", "HiDreamImageTransformer2DModel"),
    *("Kandinsky5Transformer3DModel", "Krea2Transformer2DModel"),
)
# By diffusers' names, those of which ComfyUI has a part of a weight, or one with its halves swapped.
_PARTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp", "norm_out.linear")
_ORIGINAL = "a single file"
_TEXT = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def write(
    deltas: AdapterOnModel,
    out: Out,
    *,
    dtype: torch.dtype | None,
    force: bool,
    progress: bool,
    more: Sequence[AdapterOnModel] = (),
) -> Exported:
    """Write the file: factors by the names that ComfyUI knows each model's modules by, the rest as float32 differences.

    Args:
        deltas: The adapter of one component.
        out: Where.
        dtype: Of the factors.
        force: Replace an earlier export.
        progress: Show a progress bar.
        more: Adapters of other components.

    Raises:
        AdapterError: A model is none that ComfyUI has names for which are known here, something in an adapter has none,
            or the file cannot be written.
    """
    single = None if more else _of_file(deltas)
    parts = [single] if single else components([deltas, *more])
    dtype = dtype or deltas.folder.dtype()
    tensors: dict[str, Tensor] = {}
    ranks = [0]
    for part in parts:
        for name in progress_bar(part.deltas.names, desc=part.name, progress=progress):
            own = _lora(part, name, dtype)
            tensors |= own
            ranks.append(max(int(tensor) for key, tensor in own.items() if key.endswith(".alpha")))
        tensors |= _differences(part)
    exported = account("comfyui", parts, out, tensors, dtype=dtype, rank=max(ranks), notes=_notes(tensors))
    write_file(out, tensors, metadata_of(parts, exported), what="The LoRA for ComfyUI", force=force)
    return exported


def _notes(tensors: dict[str, Tensor]) -> list[str]:
    count = sum(name.endswith((".diff", ".diff_b")) for name in tensors)
    return [f"{count} tensors without factors are in it as differences, which ComfyUI alone reads."] if count else []


def _of_file(deltas: AdapterOnModel) -> Component | None:
    """The model of a single file under its original names, which ComfyUI has too; None of another."""
    named = deltas.names and all(name.startswith(PREFIXES) for name in deltas.names)
    return Component("diffusion_model", _ORIGINAL, deltas) if named and not deltas.base.config else None


def key_of(part: Component, module: str) -> str:
    """The beginning of a module's keys.

    Raises:
        AdapterError: None is known.
    """
    if part.cls == _ORIGINAL:
        return f"diffusion_model.{module.partition('diffusion_model.')[2]}"
    if part.text:
        clip = "t5xxl" if part.cls.startswith("T5") else _TEXT.get(part.name)
        if part.cls == "CLIPTextModel" and (part.deltas.base.config or {}).get("hidden_size") == 1024:
            clip = "clip_h"
        if clip is None or not part.cls.startswith(("CLIPText", "T5")):
            raise AdapterError(f"ComfyUI's names for the text encoder `{part.deltas.base.label}` are not known here.")
        return f"text_encoders.{clip}.transformer.{old_name(part, module)}"
    if part.cls == "UNet2DConditionModel":
        return f"lora_unet_{module.replace('.', '_')}"
    if part.cls in _AS_IN_DIFFUSERS:
        return f"transformer.{module}"
    if found := fused(part.cls, [module]) if part.cls in FAMILIES else {}:
        return f"diffusion_model.{next(iter(found))}"
    raise AdapterError(
        f"ComfyUI's name of `{module}` of `{part.cls}` is not known here. Known are UNet2DConditionModel, "
        f"{', '.join(dict.fromkeys((*_AS_IN_DIFFUSERS, *FAMILIES)))}, CLIP and T5. Use `{asked('to', 'merged')}`."
    )


def _lora(part: Component, module: str, dtype: torch.dtype) -> dict[str, Tensor]:
    kind = part.deltas.slots[module].kind
    if not kind.transposed:
        return lora(part, key_of(part, module), (module,), dtype)
    # An embedding's weight is the other way round.
    name, found = key_of(part, module), part.deltas.factors(module)
    a, b = filed(name, Factors(found.b.mT, found.a.mT), (), None, dtype)
    alpha = torch.tensor(float(len(a)), dtype=torch.float32)
    return {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": alpha}


def _differences(part: Component) -> dict[str, Tensor]:
    """What is added without factors, by key.

    Raises:
        AdapterError: ComfyUI has no name for one of them.
    """
    found: dict[str, Tensor] = {}
    by_fused: dict[str, tuple[str, ...]] = {}
    all_summands = summands(part.deltas)
    for name, delta in all_summands.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):  # A parameter of its own: ComfyUI knows it by the original's name alone.
            found[f"{_original(part, name)}.diff"] = delta.float()
            continue
        if leaf == "bias" and (original := _swapped(part, module)):
            found[f"diffusion_model.{original}.diff_b"] = swapped(delta.float())
            continue
        if not part.text and leaf == "bias" and part.cls in _AS_IN_DIFFUSERS and module.endswith(_PARTS):
            by_fused |= _fused(part, module)
            continue
        if leaf == "weight" and part.deltas.rank_of(module):
            raise AdapterError(f"`{name}` has factors and a difference too; ComfyUI takes one of them.")
        found[f"{key_of(part, module)}.{'diff' if leaf == 'weight' else 'diff_b'}"] = delta.float()
    for original, modules in by_fused.items():
        rows = [all_summands.get(f"{one}.bias", torch.zeros(part.deltas.slots[one].m)) for one in modules]
        found[f"diffusion_model.{original}.diff_b"] = torch.cat([one.float() for one in rows])
    return found


def _original(part: Component, name: str) -> str:
    """The key of a parameter that is no module's weight or bias.

    Raises:
        AdapterError: None is known.
    """
    if not (found := fused(part.cls, [name]) if part.cls in FAMILIES else {}):
        raise AdapterError(
            f"ComfyUI's name of `{name}` of `{part.cls}` is not known here. Leave it out when you extract "
            f"(`{asked('exclude', name.rpartition('.')[2])}`), or use `{asked('to', 'merged')}`."
        )
    return f"diffusion_model.{next(iter(found))}"


def _swapped(part: Component, module: str) -> str | None:
    """The original of a module that ComfyUI has with its halves the other way round."""
    if part.cls not in ("FluxTransformer2DModel", "SD3Transformer2DModel"):
        return None
    if module == "norm_out.linear":
        return SWAPPED[0]
    last = int((part.deltas.base.config or {}).get("num_layers", 0)) - 1
    of_sd3 = part.cls.startswith("SD3") and module == f"transformer_blocks.{last}.norm1_context.linear"
    return f"joint_blocks.{last}.context_block.adaLN_modulation.1" if of_sd3 else None


def _fused(part: Component, module: str) -> dict[str, tuple[str, ...]]:
    """The original module that one is a part of.

    Raises:
        AdapterError: Its name is not known.
    """
    found = fused(part.cls, [module]) if part.cls in FAMILIES else {}
    if not found:
        raise AdapterError(
            f"ComfyUI adds nothing to a part of a fused bias (`{module}.bias`), and the name of the whole is not known "
            f"here. Use `{asked('to', 'merged')}`."
        )
    return found
