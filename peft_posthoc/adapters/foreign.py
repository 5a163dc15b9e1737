"""Adapters in other programs' formats: recognised by the names of their tensors, and refused with what can be done."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from peft_posthoc.adapters.config import CONFIG, PICKLE, WEIGHTS
from peft_posthoc.checkpoints.folder import File
from peft_posthoc.errors import AdapterError, PosthocError

_FUSE = (
    "Fuse it into its model with diffusers (`load_lora_weights`, `fuse_lora`) and give that model, or give a PEFT LoRA "
    "folder."
)
_FACTOR = r"(_lora|\.lora|\.lora_(A|B|down|up)|_lora\.(down|up)|\.lora\.(down|up))(\.default)?(\.weight)?"

# In the name of every tensor of such a file, and of none of a model's.
_OF_ADAPTER = re.compile(
    r"(^|[._])lora([._]|$)"
    r"|\.(alpha|dora_scale|diff|diff_b|set_weight|w_norm|b_norm|hada_\w+|lokr_\w+|oft_\w+)$"
)


class Format(NamedTuple):
    """A format of adapters that is not PEFT's."""

    owner: str
    """The program that writes it."""
    names: str
    """A regular expression for the names of its tensors."""
    advice: str


# Opened by `image_file`; LyCORIS' to say which of its methods it is.
_READ = ("LyCORIS", "kohya's scripts (sd-scripts, musubi-tuner)", "ComfyUI", "diffusers")

_FORMATS = (
    Format("LyCORIS", r".+\.(hada_w[12](_[ab])?|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2|oft_blocks|oft_diag)", _FUSE),
    Format(
        "kohya's scripts (sd-scripts, musubi-tuner)", r"(lora|lycoris)_(unet|te\d?|transformer|prior_\w+)_.+", _FUSE
    ),
    Format("ComfyUI", rf"(diffusion_model|text_encoders)\..+{_FACTOR}", _FUSE),
    Format("diffusers", rf"(unet|transformer(_2)?|text_encoder(_\d)?|prior|controlnet)\..+{_FACTOR}", _FUSE),
    Format("PEFT", r"base_model\.model\..+\.lora_.+", f"Give the folder that has its `{CONFIG}` too."),
    Format("MLX-LM", r".+\.lora_[ab]", "Merge it into its model with `mlx_lm.fuse`, and give that model."),
    Format("another program", rf".+{_FACTOR}", _FUSE),
)


def format_of(names: Iterable[str]) -> Format | None:
    """The format of an adapter with tensors of these names; None where some are no adapter's, or none is known."""
    names = list(names)
    if not all(_OF_ADAPTER.search(name) for name in names):
        return None
    return next((form for form in _FORMATS if any(re.fullmatch(form.names, name) for name in names)), None)


def image_file(place: Path) -> tuple[Path, str | None] | None:
    """The LoRA file of an image model that a place is, or holds, and the component named with it; None for others."""
    path, component = place, None
    if not place.exists() and ":" in place.name:
        name, _, component = place.name.rpartition(":")
        path = place.with_name(name)
    if any((path / name).exists() for name in (WEIGHTS, PICKLE)):
        return None
    files = [path] if path.is_file() and path.suffix == ".safetensors" else sorted(path.glob("*.safetensors"))
    for file in files if len(files) == 1 else ():
        try:
            names = File(file, label=str(file)).headers
        except PosthocError:
            continue
        if (form := format_of(names)) is not None and form.owner in _READ:
            return file, component
    return None


def refuse_foreign(place: Path) -> None:
    """See that a place with an adapter holds one of PEFT's, if it can be told.

    Raises:
        AdapterError: A file there is in another program's format.
    """
    if place.suffix == ".gguf":
        raise AdapterError(f"`{place}` is a GGUF file, which is not read here. Give the PEFT LoRA folder it is from.")
    if any((place / name).exists() for name in (WEIGHTS, PICKLE)):
        return
    for file in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
        try:
            names = File(file, label=str(file)).headers
        except PosthocError:
            continue
        if (form := format_of(names)) is not None:
            raise AdapterError(
                f"`{file}` is an adapter in the format of {form.owner}, not a PEFT LoRA folder. {form.advice}"
            )
