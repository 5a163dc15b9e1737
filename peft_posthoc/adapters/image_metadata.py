"""What a LoRA file of an image model says of itself in its header, for each program that reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

DIFFUSERS = "lora_adapter_metadata"
"""diffusers: a LoraConfig of each component as JSON, its keys behind the component's name."""


def config_in(metadata: Mapping[str, str], component: str) -> dict[str, Any]:
    """The LoraConfig of a component that a file's header holds for diffusers; empty where there is none.

    Args:
        metadata: The header's.
        component: As `image_names.read_name` calls it.
    """
    try:
        told = json.loads(metadata.get(DIFFUSERS, "{}"))
    except ValueError:
        return {}
    names = ("unet.", "transformer.") if component == "denoiser" else (f"{component}.",)
    found = {key.removeprefix(one): own for one in names for key, own in told.items() if key.startswith(one)}
    return found if "lora_alpha" in found else {}
