"""What runs have written: a file for each row, and one for the energies of the pair."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .settings import Settings

SPECTRUM = "spectrum.json"
LAYERS = "layers.json"


@dataclass(frozen=True)
class Run:
    """The rows of one fine-tune."""

    config: str
    rows: tuple[dict[str, Any], ...]
    spectrum: dict[str, Any] | None
    layers: dict[str, Any] | None

    @property
    def settings(self) -> Settings:
        """Those of its rows, which are all the same."""
        return Settings(**self.rows[0]["settings"])

    @property
    def metrics(self) -> list[str]:
        """The first one is the one that is compared."""
        return list(self.rows[0]["metrics"])

    def row(self, name: str) -> dict[str, Any] | None:
        """The row of this name, if it is there."""
        return next((row for row in self.rows if row["row"] == name), None)

    @property
    def extracted(self) -> list[dict[str, Any]]:
        """The rows of truncated SVDs, by rank."""
        return [row for row in self.rows if "energy" in row]


def read(results: Path) -> Iterator[list[Run]]:
    """The runs of each configuration: one, or one for each seed."""
    for folder in sorted(results.iterdir()) if results.is_dir() else []:
        seeds = sorted(folder.glob("seed-*"))
        runs = [_run(folder.name, place) for place in seeds or [folder] if any(place.glob("[0-9]*.json"))]
        if runs:
            yield runs


def mean(row: dict[str, Any], metric: str) -> float:
    """Over the questions."""
    values = row["metrics"][metric].values()
    return float(sum(values) / len(values))


def differences(row: dict[str, Any], other: dict[str, Any], metric: str) -> list[float]:
    """Of two rows, question by question."""
    against = other["metrics"][metric]
    return [value - against[key] for key, value in row["metrics"][metric].items()]


def _run(config: str, folder: Path) -> Run:
    rows = tuple(json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("[0-9]*.json")))
    files = [folder / name for name in (SPECTRUM, LAYERS)]
    return Run(config, rows, *(json.loads(one.read_text(encoding="utf-8")) if one.is_file() else None for one in files))
