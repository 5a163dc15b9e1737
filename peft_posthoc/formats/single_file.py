"""One safetensors file as an export, with the metadata that its readers look for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_posthoc.adapters.image_metadata import DIFFUSERS
from peft_posthoc.adapters.writer import sort_metadata
from peft_posthoc.files import staged
from peft_posthoc.formats.components import Component
from peft_posthoc.formats.result import Exported, Out

# By class, and of UNets by the width of what they attend to: kohya's name of the base, and the modelspec's.
_BASES = {
    "UNet2DConditionModel 768": ("sd_v1", "stable-diffusion-v1"),
    "UNet2DConditionModel 1024": ("sd_v2", "stable-diffusion-v2-768-v"),
    "UNet2DConditionModel 2048": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    "SD3Transformer2DModel": ("sd3", "stable-diffusion-3"),
    "FluxTransformer2DModel": ("flux1", "flux-1-dev"),
    "QwenImageTransformer2DModel": ("qwen_image", "qwen-image"),
    "WanTransformer3DModel": ("wan2.1", "wan2.1"),
}


def metadata_of(
    parts: Sequence[Component], exported: Exported, configs: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The header's metadata: kohya's `ss_network_*`, the modelspec's, and diffusers' configurations where given.

    Args:
        parts: The components in the file.
        exported: The account.
        configs: diffusers' `lora_adapter_metadata`.
    """
    rank = exported.rank or exported.rank_before
    provenance = {
        "adapter": exported.adapter,
        "base": exported.base,
        "to": exported.to,
        "versions": {"peft-posthoc": metadata.version("peft-posthoc")},
    }
    found = {
        "format": "pt",
        "phlora": json.dumps(provenance, sort_keys=True),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": exported.adapter.rstrip("/").rpartition("/")[2],
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
    }
    for part in parts:
        width = (part.deltas.base.config or {}).get("cross_attention_dim")
        if told := _BASES.get(part.cls) or _BASES.get(f"{part.cls} {width}"):
            found |= {"ss_base_model_version": told[0], "modelspec.architecture": f"{told[1]}/lora"}
            found["ss_v2"] = str(told[0] == "sd_v2")
    return found if configs is None else {**found, DIFFUSERS: json.dumps(configs, sort_keys=True)}


def write_file(out: Out, tensors: Mapping[str, Tensor], header: Mapping[str, str], *, what: str, force: bool) -> None:
    """Write the file, whole or not at all.

    Raises:
        AdapterError: It cannot be written.
    """
    with staged(out.place, what=what, called=out.called, force=force, ours=()) as made:
        save(tensors, made, header)


def save(tensors: Mapping[str, Tensor], place: Path, header: Mapping[str, str]) -> None:
    """Save tensors as a file of ordinary rights, the same bytes each time."""
    place.touch()
    mode = place.stat().st_mode  # safetensors makes files that only their owner can read.
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place, metadata=dict(header))
    sort_metadata(place)
    place.chmod(mode)


def account(
    to: str,
    parts: Sequence[Component],
    out: Out,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    rank: int | None,
    notes: Sequence[str],
    file: str | None = None,
) -> Exported:
    """The account of all components together."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    each = [
        Exported.of(to, one.deltas, out, dtype=dtype, rank=rank, files=(file or out.place.name,), size=size, notes=())
        for one in parts
    ]
    told = [note for one in parts for note in one.deltas.notes()]
    return replace(
        each[0],
        adapter=", ".join(one.adapter for one in each),
        base=", ".join(one.base for one in each),
        matrices=sum(one.matrices for one in each),
        rank_before=max(one.rank_before for one in each),
        notes=(*told, *notes, *(note for one in each for note in one.notes)),
    )
