"""An adapter that is not there yet: what would be in its file, without the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_posthoc.adapters.reader import LoraFolder
from peft_posthoc.checkpoints.checkpoint import Header


class Planned(LoraFolder):
    """Modules and headers; there is no tensor to ask for.

    Args:
        place: Where it would be written.
        config: What its configuration would be.
        headers: Of its tensors.
    """

    def __init__(self, place: Path, config: Mapping[str, Any], headers: Mapping[str, Header]) -> None:
        self.label, self.place, self.config, self.files = str(place), place.absolute(), config, ()
        self._sort(headers)
