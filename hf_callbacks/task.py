"""One extraction, from JSON: what the background process is given, and does."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_posthoc.extraction.extract import extract
from peft_posthoc.extraction.request import Request
from peft_posthoc.json_file import read_json


@dataclass(frozen=True)
class Task:
    """Two models, what is asked for, and where the adapter goes."""

    base: str
    tuned: str
    out: str
    request: dict[str, Any]
    """As `Request.to_json` tells it."""

    def write(self, file: Path) -> None:
        """Write it down for another process."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Task:
        """The task that was written down."""
        return cls(**read_json(Path(file)))

    def run(self) -> None:
        """Extract, and write the adapter in place of one that is there."""
        request = Request.from_json(self.request)
        extract(self.base, self.tuned, request, out=self.out).save(self.out, force=True)
