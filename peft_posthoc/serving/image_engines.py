"""The programs that load LoRAs of image models."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from peft_posthoc.serving.engines import Engine
from peft_posthoc.serving.image_subject import ImageSubject


def _diffusers(subject: ImageSubject) -> list[str]:
    path = Path(subject.label)
    where = f"{str(path.parent)!r}, weight_name={path.name!r}" if path.suffix == ".safetensors" else repr(str(path))
    return [f"pipe.load_lora_weights({where})"]


def _comfyui(subject: ImageSubject) -> list[str]:
    return [f"cp {shlex.quote(subject.label)} ComfyUI/models/loras/  # the node Load LoRA"]


def _a1111(subject: ImageSubject) -> list[str]:
    return [f"cp {shlex.quote(subject.label)} models/Lora/  # <lora:{Path(subject.label).stem}:1> in the prompt"]


IMAGE_ENGINES: Mapping[str, Engine] = {
    "diffusers": Engine("diffusers", "0.42.1 (run)", _diffusers),
    "comfyui": Engine("ComfyUI", "git 17358c8, 2026 (read)", _comfyui),
    "a1111": Engine("A1111", "1.10, and what Forge has of it (read)", _a1111),
}
