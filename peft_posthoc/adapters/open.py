"""The one way in for adapters. Another format of them is a class with the attributes of `AdapterFile`."""

from __future__ import annotations

import os
from pathlib import Path

from peft_posthoc.adapters.foreign import refuse_foreign
from peft_posthoc.adapters.reader import AdapterFile, LoraFolder


def open_adapter(place: str | os.PathLike[str]) -> AdapterFile:
    """Open an adapter, in whatever format it lies there.

    Args:
        place: A PEFT LoRA folder.

    Raises:
        AdapterError: It is in another program's format, cannot be read, PEFT would not load it, or what it adds
            to the weights is not the product of its factors alone.
    """
    refuse_foreign(Path(place))
    return LoraFolder(place)
