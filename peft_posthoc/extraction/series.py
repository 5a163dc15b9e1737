"""Several adapters of one factorization: `OUT/r8`, `OUT/r16`, ..."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_posthoc.adapters.writer import check_target
from peft_posthoc.errors import noting
from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.spool import finished_layers
from peft_posthoc.ranks.rules import several
from peft_posthoc.text import as_html, percent, size


@dataclass(frozen=True, repr=False)
class Series:
    """The same layers at several ranks."""

    adapters: Mapping[str, Adapter]
    """By the folder's name."""

    @classmethod
    def of(cls, adapter: Adapter, rules: several) -> Series:
        """What each of the rules keeps of an adapter that was extracted with all of them."""
        return cls({name: adapter.at(rule) for name, rule in rules.named})

    def __repr__(self) -> str:
        return f"<Series of {', '.join(self.adapters)}>"

    def _repr_html_(self) -> str:
        return as_html(self.table())

    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write each into a folder of its own in `folder`: every one whole or not at all.

        Args:
            folder: Where they go.
            force: Replace adapters that are there.

        Raises:
            AdapterError: One of the folders holds something, or cannot be written.
        """
        place = Path(folder).absolute()
        with (
            finished_layers(place, {place / name: one.provenance for name, one in self.adapters.items()}),
            contextlib.ExitStack() as written,
        ):
            check_targets(folder, self.adapters, force=force)
            for name, adapter in self.adapters.items():
                adapter.save(place / name, force=force)
                written.enter_context(noting(f"`{Path(folder) / name}` is written."))
        return Path(folder)

    def to_dict(self) -> dict[str, Any]:
        """The reports, by the folder's name."""
        return {name: adapter.report.to_dict() for name, adapter in self.adapters.items()}

    def table(self) -> str:
        """A row for every adapter, and what must be known of them all."""
        lines = [f"{'adapter':<16} {'rank':>5} {'E_r':>7} {'of all':>7} {'error':>7} {'size':>9}"]
        for name, adapter in self.adapters.items():
            totals = adapter.report.totals
            lines.append(
                f"{name:<16} {totals.rank:>5} {percent(totals.energy):>7} {percent(totals.energy_of_all):>7} "
                f"{percent(totals.relative_error):>7} {size(totals.bytes):>9}"
            )
        warnings = dict.fromkeys(warning for one in self.adapters.values() for warning in one.report.warnings)
        return "\n".join([*lines, *(f"Warning: {warning}" for warning in warnings)])


def check_targets(folder: str | os.PathLike[str], names: Mapping[str, Any], *, force: bool = False) -> None:
    """See before the work whether the adapters may be written there.

    Raises:
        AdapterError: Something is there that must not be replaced.
    """
    for name in names:
        check_target(Path(folder) / name, force=force)
