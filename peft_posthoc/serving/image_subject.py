"""A LoRA of an image model as the programs that load it see it: names, shapes and metadata of one file, none read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft_posthoc.adapters.config import WEIGHTS
from peft_posthoc.adapters.foreign import image_file, refuse_foreign
from peft_posthoc.adapters.image_metadata import DIFFUSERS
from peft_posthoc.adapters.image_names import Named, read_name
from peft_posthoc.adapters.names import PREFIX
from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.folder import File
from peft_posthoc.errors import AdapterError, CheckpointError


@dataclass(frozen=True)
class ImageSubject:
    """A LoRA file, or the file in a PEFT folder."""

    label: str
    headers: Mapping[str, Header]
    metadata: Mapping[str, str]
    base: None = None
    config: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, place: str | os.PathLike[str]) -> ImageSubject:
        """Read the header of a LoRA file.

        Args:
            place: The file, with or without `:COMPONENT`, or a folder with it or with PEFT's.

        Raises:
            AdapterError: There is none.
        """
        found = image_file(Path(place))
        path = Path(place) / WEIGHTS if found is None else found[0]
        if found is None:
            refuse_foreign(Path(place))
        try:
            file = File(path, label=str(place))
        except (CheckpointError, OSError) as error:
            raise AdapterError(f"`{place}` is no LoRA file, and no folder of PEFT's with {WEIGHTS}.") from error
        return cls(str(place), file.headers, file.metadata)

    @cached_property
    def named(self) -> dict[str, Named]:
        """What the names say that are known, by name."""
        return {name: said for name in self.headers if (said := read_name(name)) is not None}

    @property
    def of_peft(self) -> tuple[str, ...]:
        """The names that begin as PEFT's do."""
        return tuple(name for name in self.headers if name.startswith(PREFIX))

    @property
    def has_configs(self) -> bool:
        """True where the header has configurations for diffusers."""
        return DIFFUSERS in self.metadata

    def parts(self, *kinds: str) -> tuple[str, ...]:
        """The tensors that are these parts of modules."""
        return tuple(name for name, said in self.named.items() if said.part in kinds)

    def called(self, part: str) -> tuple[str, ...]:
        """The tensors with this in their names."""
        return tuple(name for name in self.headers if part in name)

    def without_alpha(self) -> tuple[str, ...]:
        """Factors of modules that say no alpha."""
        said = {(one.component, one.module) for one in self.named.values() if one.part == "alpha"}
        return tuple(
            name
            for name, one in self.named.items()
            if one.part == "down" and (one.component, one.module) not in said and not self.has_configs
        )

    def ranks(self) -> set[int]:
        """The ranks of all modules."""
        return {self.headers[name].shape[0] for name in self.parts("down") if self.headers[name].shape}
