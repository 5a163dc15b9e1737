"""diffusers' LoRA file: what `pipe.load_lora_weights(folder)` loads into one component of a pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from peft_posthoc.adapters.cast import cast
from peft_posthoc.adapters.names import PREFIX
from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.checkpoints.checkpoint import place_of
from peft_posthoc.errors import AdapterError
from peft_posthoc.files import staged
from peft_posthoc.formats.result import Exported, Out, files_of, write_report

FILE = "pytorch_lora_weights.safetensors"
# Components that diffusers' pipelines load adapters into: the folder's name, or a part of the class's.
_COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2")
_BY_CLASS = {"UNet": "unet", "Transformer": "transformer", "CLIPText": "text_encoder"}


def write(deltas: AdapterOnModel, out: Out, *, dtype: torch.dtype | None, force: bool, progress: bool) -> Exported:
    """Write the folder.

    Keys are the component and the module, `unet.down_blocks.0...to_q.lora_A.weight`. All have one rank, so that the
    scale that diffusers 0.42 makes up from the shapes, `loaders/peft.py`, is one.

    Raises:
        AdapterError: The model is no component of a pipeline, the adapter is more than factors of linear layers and
            convolutions, or the file cannot be written.
    """
    deltas.only_factors("diffusers", convolutions=True)
    component = _component(deltas)
    dtype, rank = dtype or deltas.folder.dtype(), deltas.rank
    tensors: dict[str, Tensor] = {}
    for name, module in tqdm(deltas.folder.modules.items(), desc="Modules", disable=not progress):
        if module.kind not in ("linear", "convolution"):
            raise AdapterError(f"`{name}` is of the kind {module.kind}, which diffusers has no LoRA for.")
        parts = [cast(one.a, one.b, dtype, name, rank=rank) for one in deltas.folder.factors(name)]
        own = module.join(parts)
        tensors |= {f"{component}.{key.removeprefix(PREFIX)}": tensor for key, tensor in own.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    notes = [*deltas.notes(), f"For the component `{component}`: `pipe.load_lora_weights({out.called!r})`."]
    exported = Exported.of("diffusers", deltas, out, dtype=dtype, rank=rank, files=(FILE,), size=size, notes=notes)
    ours = files_of(out.place)
    with staged(out.place, what="The LoRA of diffusers", called=out.called, force=force, ours=ours) as made:
        made.mkdir()
        save_file(tensors, made / FILE, metadata={"format": "pt"})
        write_report(Path(made), exported)
    return exported


def _component(deltas: AdapterOnModel) -> str:
    """The name of the model within its pipeline, by its folder or by its class.

    Raises:
        AdapterError: Neither tells.
    """
    place, config = place_of(deltas.base), deltas.base.config or {}
    if place is not None and place.name in _COMPONENTS:
        return place.name
    named = str(config.get("_class_name") or next(iter(config.get("architectures") or ()), ""))
    found = next((component for part, component in _BY_CLASS.items() if part in named), None)
    if found is None or not ("_class_name" in config or found == "text_encoder"):
        raise AdapterError(
            f"The base `{deltas.base.label}` ({named or 'of no known class'}) is no component of a diffusers pipeline: "
            f"its folder is called none of {', '.join(_COMPONENTS)}."
        )
    return found
