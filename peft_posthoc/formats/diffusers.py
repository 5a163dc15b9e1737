"""diffusers' LoRA file: what `pipe.load_lora_weights` loads into the components of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.adapters.config import adapter_config
from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.errors import AdapterError
from peft_posthoc.files import staged
from peft_posthoc.formats.components import Component, components, factors_of, filed, old_name
from peft_posthoc.formats.only_factors import only_factors
from peft_posthoc.formats.result import Exported, Out, files_of, write_report
from peft_posthoc.formats.single_file import account, metadata_of, save, write_file
from peft_posthoc.progress import progress_bar
from peft_posthoc.text import asked

FILE = "pytorch_lora_weights.safetensors"
_BIASES = r"\.bias$"


def write(
    deltas: AdapterOnModel,
    out: Out,
    *,
    dtype: torch.dtype | None,
    force: bool,
    progress: bool,
    more: Sequence[AdapterOnModel] = (),
) -> Exported:
    """Write the folder, or the file where the output's name ends in `.safetensors`.

    Keys are the component and the module, `unet.down_blocks.0...to_q.lora_A.weight`. All have one rank, so that the
    scale that diffusers before 0.40 makes up from the shapes, `loaders/peft.py`, is one.

    Args:
        deltas: The adapter of one component.
        out: Where.
        dtype: Of the factors.
        force: Replace an earlier export.
        progress: Show a progress bar.
        more: Adapters of other components.

    Raises:
        AdapterError: A model is no component of a pipeline, an adapter is more than factors of linear layers and
            convolutions and sums for their biases, or the file cannot be written.
    """
    parts = components([deltas, *more])
    dtype = dtype or deltas.folder.dtype()
    rank = max(len(factors_of(one.deltas, name).a) for one in parts for name in one.deltas.names)
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for part in parts:
        own = _tensors(part, rank, dtype, progress)
        tensors |= {f"{part.name}.{name}": tensor for name, tensor in own.items()}
        configs |= {f"{part.name}.{key}": value for key, value in _config(part, own, rank).items()}
    named = ", ".join(f"`{part.name}`" for part in parts)
    is_file = out.place.suffix == ".safetensors"
    load = f"{str(Path(out.called).parent)!r}, weight_name={out.place.name!r}" if is_file else repr(out.called)
    notes = [f"For the component{'s' if len(parts) > 1 else ''} {named}: `pipe.load_lora_weights({load})`."]
    notes += [
        f"`{bare}` has no bias, and one in the file: `pipe.fuse_lora()` refuses it. To fuse, leave biases out when "
        f"you extract: `{asked('exclude', _BIASES)}`."
        for part in parts
        if part.deltas.biases and (bare := _unbiased(part.deltas))
    ]
    file = out.place.name if is_file else FILE
    exported = account("diffusers", parts, out, tensors, dtype=dtype, rank=rank, notes=notes, file=file)
    header = metadata_of(parts, exported, configs)
    if is_file:
        write_file(out, tensors, header, what="The LoRA of diffusers", force=force)
        return exported
    ours = files_of(out.place)
    with staged(out.place, what="The LoRA of diffusers", called=out.called, force=force, ours=ours) as made:
        made.mkdir()
        save(tensors, made / FILE, header)
        write_report(Path(made), exported)
    return exported


def _tensors(part: Component, rank: int, dtype: torch.dtype, progress: bool) -> dict[str, Tensor]:
    """A component's tensors, by module and key."""
    deltas = part.deltas
    only_factors(deltas, "diffusers", convolutions=True, biases=True)
    found: dict[str, Tensor] = {}
    for name in progress_bar(deltas.names, desc=part.name, progress=progress):
        kind = deltas.slots[name].kind
        if kind.transposed or kind.stacked:
            raise AdapterError(f"`{name}` is of the kind {kind.name}, which diffusers has no LoRA for.")
        a, b = filed(name, factors_of(deltas, name), deltas.kernel_of(name), rank, dtype)
        own = old_name(part, name)
        found |= {f"{own}.lora_A.weight": a, f"{own}.lora_B.weight": b}
        if deltas.biases:  # diffusers makes one for every module, where there is one.
            zeros = torch.zeros(deltas.slots[name].m, dtype=dtype)
            found[f"{own}.lora_B.bias"] = deltas.bias(name).to(dtype) if name in deltas.biases else zeros
    return found


def _unbiased(deltas: AdapterOnModel) -> str | None:
    """A module with factors that has no bias."""
    biased = {own for name in deltas.base.headers for own in deltas.layout.names_of(name)}
    return next((name for name in deltas.names if f"{name}.bias" not in biased), None)


def _config(part: Component, tensors: dict[str, Tensor], rank: int) -> dict[str, Any]:
    """The LoraConfig that diffusers reads rank and scale from, where its version does."""
    suffix = ".lora_A.weight"
    # Modules are found by the ends of names: CLIP's in transformers 5 begin later.
    modules = sorted(name.removesuffix(suffix).removeprefix("text_model.") for name in tensors if name.endswith(suffix))
    made = adapter_config(
        rank,
        modules,
        base=None,
        revision=None,
        task_type=None,
        auto_mapping=None,
        fan_in_fan_out=False,
        lora_bias=True if part.deltas.biases else None,
    )
    return {key: value for key, value in made.items() if value is not None}
