"""One extraction, and the refinement that may follow it, from JSON: what the background process is given, and does."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peft_posthoc.extraction.extract import extract
from peft_posthoc.extraction.request import Request
from peft_posthoc.json_file import read_json
from peft_posthoc.refinement.refining import Refining


@dataclass(frozen=True)
class Task:
    """Two models, what is asked for, and where the adapter goes."""

    base: str
    tuned: str
    out: str
    request: dict[str, Any]
    """As `Request.to_json` tells it."""
    refining: dict[str, Any] | None = None
    """As `Refining.to_json` tells it; None if the adapter is not refined."""
    extracted: bool = False
    """Whether the adapter lies there already, and is refined alone."""

    def write(self, file: Path) -> None:
        """Write it down for another process."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Task:
        """The task that was written down."""
        return cls(**read_json(Path(file)))

    def run(
        self, tuned: nn.Module | None = None, request: Request | None = None, refining: Refining | None = None
    ) -> None:
        """Extract, and write the adapter in place of one that is there; then refine it, and write it again.

        Where the fit fails, the adapter is there as it was extracted.

        Args:
            tuned: The live model in place of `tuned`.
            request: In place of `request`, which may not be told as JSON.
            refining: In place of `refining`, which may not either.
        """
        request = request or Request.from_json(self.request)
        after = self.tuned if tuned is None else tuned
        if not self.extracted:
            extract(self.base, after, request, out=None if tuned is not None else self.out).save(self.out, force=True)
        if self.refining is not None and refining is None:
            refining = Refining.from_json(self.refining)
        if refining is not None:
            revision, device = request.options["base_revision"], request.options["device"]
            refined = refining(self.out, self.base, after, base_revision=revision, device=device)
            refined.save(self.out, force=True)
