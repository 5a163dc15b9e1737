"""Adapters of many fine-tunes of one base, as one result."""

from __future__ import annotations

import os
from dataclasses import dataclass

from peft_posthoc.errors import noting
from peft_posthoc.files import write_whole
from peft_posthoc.fleet.found import Found
from peft_posthoc.fleet.page import page


@dataclass(frozen=True)
class Fleet(Found):
    """Adapters of many fine-tunes of one base, and how alike they are."""

    def html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that needs nothing else: the table, and pictures of what changed where and who is alike.

        Raises:
            MissingExtraError: matplotlib is not installed.
            OutputError: The file cannot be written.
        """
        with noting(f"`{path}` was not written."):
            made = page(self)
        write_whole(path, made)
