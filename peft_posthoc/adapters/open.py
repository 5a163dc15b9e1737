"""The one way in for adapters. Another format of them is a class with the attributes of `AdapterFile`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from peft_posthoc.adapters.foreign import image_file, refuse_foreign
from peft_posthoc.adapters.image_file import ImageFile
from peft_posthoc.adapters.reader import AdapterFile, LoraFolder
from peft_posthoc.checkpoints.checkpoint import Header


def open_adapter(place: str | os.PathLike[str], known: Mapping[str, Header] = {}) -> AdapterFile:
    """Open an adapter, in whatever format it lies there.

    Args:
        place: A PEFT LoRA folder; or a LoRA file of diffusers, ComfyUI or kohya's scripts, a folder with one, or
            `FILE:COMPONENT` where it is for several components of a pipeline.
        known: The headers of the model's tensors, if it is known.

    Raises:
        AdapterError: It is in another program's format, cannot be read, PEFT would not load it, or what it adds
            to the weights is not the product of its factors alone.
    """
    if (found := image_file(Path(place))) is not None:
        return ImageFile(*found, known)
    refuse_foreign(Path(place))
    return LoraFolder(place)
