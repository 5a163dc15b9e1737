"""kohya's LoRA file, which sd-scripts, A1111, Forge, SD.Next, InvokeAI and ComfyUI read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_posthoc.adapters.image_names import of_sgm
from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.checkpoints.checkpoint import place_of
from peft_posthoc.errors import AdapterError
from peft_posthoc.formats.comfyui_names import SINGLE, Place, of_file, original_of, weight_of
from peft_posthoc.formats.components import Component, components, filed, old_name, one_below_another
from peft_posthoc.formats.only_factors import only_factors
from peft_posthoc.formats.result import Exported, Out
from peft_posthoc.formats.single_file import account, metadata_of, write_file
from peft_posthoc.models.original_modules import swapped
from peft_posthoc.progress import progress_bar
from peft_posthoc.text import asked

# Whose modules have the same names there as in diffusers, or others that all readers map from diffusers'.
_AS_IN_DIFFUSERS = ("UNet2DConditionModel", "QwenImageTransformer2DModel")
_BY_ORIGINALS = ("FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel")
# But these two of SDXL, by whose names in diffusers A1111 and diffusers itself find nothing.
_OF_SGM = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}

_MODEL, _CLIP = "diffusion_model.", "text_encoders.clip_l.transformer."


def write(
    deltas: AdapterOnModel,
    out: Out,
    *,
    dtype: torch.dtype | None,
    force: bool,
    progress: bool,
    more: Sequence[AdapterOnModel] = (),
) -> Exported:
    """Write the file: `lora_unet_...lora_down.weight`, `.lora_up.weight` and `.alpha`, each module at its own rank.

    Modules that the original code fuses are one: blocks of a matrix of the sum of their ranks.

    Args:
        deltas: The adapter of one component.
        out: Where.
        dtype: Of the factors.
        force: Replace an earlier export.
        progress: Show a progress bar.
        more: Adapters of other components.

    Raises:
        AdapterError: A model is no component whose names are known, an adapter is more than factors of linear layers
            and convolutions, or the file cannot be written.
    """
    single = None if more else of_file(deltas)
    parts = [single] if single else components([deltas, *more], named=False)
    dtype = dtype or deltas.folder.dtype()
    tensors: dict[str, Tensor] = {}
    ranks: list[int] = []
    notes: list[str] = []
    for part in parts:
        prefix = _prefix(part, parts)
        for place in progress_bar(_places(part), desc=part.name, progress=progress):
            name = place.key.replace(".", "_")
            own = weight(part, place._replace(key=name if name.startswith("lora_te") else f"{prefix}{name}"), dtype)
            tensors |= own
            ranks += [int(tensor) for name, tensor in own.items() if name.endswith(".alpha")]
    if max(ranks) > max(part.deltas.rank for part in parts):
        notes.append(f"The rank is up to {max(ranks)}: what the original code fuses is blocks of one matrix.")
    exported = account("kohya", parts, out, tensors, dtype=dtype, rank=max(ranks), notes=notes)
    write_file(out, tensors, metadata_of(parts, exported), what="The LoRA of kohya's format", force=force)
    return exported


def weight(part: Component, place: Place, dtype: torch.dtype) -> dict[str, Tensor]:
    """The factors of a weight."""
    key, modules, turned = place
    factors = one_below_another(part.deltas, modules)
    kernel = part.deltas.kernel_of(modules[0]) if len(modules) == 1 else ()
    a, b = filed(key, factors, kernel, None, dtype)
    alpha = torch.tensor(float(len(a)), dtype=torch.float32)
    return {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": swapped(b) if turned else b, f"{key}.alpha": alpha}


def _places(part: Component) -> list[Place]:
    """The weights by the format's names before dots became underscores.

    Raises:
        AdapterError: A module has no name there.
    """
    only_factors(part.deltas, "kohya's format", convolutions=True)
    names = part.deltas.names
    if odd := [name for name in names if (kind := part.deltas.slots[name].kind).transposed or kind.stacked]:
        raise AdapterError(f"`{odd[0]}` is an embedding or of an expert, which kohya's format has no LoRA for.")
    if part.cls == SINGLE:
        # SDXL's go by their authors' names, those of the UNets before it by diffusers'.
        wide = any(".label_emb." in name for name in part.deltas.base.headers)
        found = []
        for name in names:
            key = weight_of(part, name).key
            if key.startswith(_CLIP):
                own = f"lora_te{'1' if wide else ''}_{key.removeprefix(_CLIP)}"
            else:
                own = key.removeprefix(_MODEL) if wide else of_sgm(key.removeprefix(_MODEL))
            found.append(Place(own, (name,)))
        return found
    if part.text or part.cls in _AS_IN_DIFFUSERS:
        return [Place(_OF_SGM.get(name, old_name(part, name)), (name,)) for name in names]
    if part.cls not in _BY_ORIGINALS:
        raise AdapterError(
            f"The names of `{part.cls}` in kohya's format are not known here. Known are "
            f"{', '.join((*_AS_IN_DIFFUSERS, *_BY_ORIGINALS))} and text encoders. Use `{asked('to', 'comfyui')}`."
        )
    places: dict[Place, None] = {}
    for name in names:
        if (place := original_of(part, name)) is None:
            raise AdapterError(
                f"`{name}` has no name in kohya's format that is known here. Use `{asked('to', 'comfyui')}`."
            )
        places[place._replace(key=place.key.removeprefix(_MODEL))] = None
    return list(places)


def _prefix(part: Component, parts: Sequence[Component]) -> str:
    if not part.text:
        return "lora_unet_"
    number = part.name.rpartition("_")[2]
    # Flux has T5 second, and kohya's scripts call it the third all the same.
    number = "3" if part.cls.startswith("T5") else number if number.isdigit() else "1"
    place = place_of(part.deltas.base)
    among = place is not None and (place.parent / "text_encoder_2").is_dir()
    only = number == "1" and not among and not any(one.name.startswith("text_encoder_") for one in parts)
    wide = any((one.deltas.base.config or {}).get("cross_attention_dim") == 2048 for one in parts)
    dits = any(one.name.startswith("transformer") for one in parts)
    return "lora_te_" if only and not wide and not dits else f"lora_te{number}_"
