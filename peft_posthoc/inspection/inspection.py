"""Which rank? Everything that two checkpoints tell before an adapter is made, from one pass over them."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Unpack

from peft_posthoc.errors import noting
from peft_posthoc.extraction.extract import extract
from peft_posthoc.extraction.request import Options, takes_options
from peft_posthoc.files import write_whole
from peft_posthoc.inspection.found import Found
from peft_posthoc.inspection.page import page
from peft_posthoc.inspection.plots import picture
from peft_posthoc.inspection.table import table
from peft_posthoc.ranks.rules import fixed
from peft_posthoc.sources import Source
from peft_posthoc.text import as_html


@dataclass(frozen=True)
class up_to(fixed):
    """Factor as far as `rank`, and measure the noise."""

    measures_noise = True


@dataclass(frozen=True, repr=False)
class Inspection(Found):
    """The spectra of all deltas, and what every rank rule would make of them."""

    def __repr__(self) -> str:
        return f"<Inspection of {self.report.provenance['tuned']}: {len(self.spectra)} weights>"

    def _repr_html_(self) -> str:
        return as_html(self.table())

    def table(self, *, layers: bool = False) -> str:
        """For a terminal: what to know first, a row for each kind of module, a row for every rule.

        Args:
            layers: A row for every weight instead of each kind.
        """
        return table(self, layers=layers)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw energy against rank, energy over layers and modules, and the ranks of two rules, into one picture.

        Args:
            path: A PNG, or of another suffix that matplotlib knows.

        Raises:
            MissingExtraError: matplotlib is not installed.
            OutputError: The file cannot be written.
            ValueError: matplotlib knows no such format.
        """
        with noting(f"`{path}` was not written."):
            drawn = picture(self, Path(path).suffix)
        write_whole(path, drawn)

    def html(self, path: str | PathLike[str]) -> None:
        """Write one page that needs nothing else: the same pictures, and tables that can be sorted.

        Raises:
            MissingExtraError: matplotlib is not installed.
            OutputError: The file cannot be written.
        """
        with noting(f"`{path}` was not written."):
            made = page(self)
        write_whole(path, made)


@takes_options
def inspect(
    base: Source, tuned: Source, max_rank: int = 512, *, progress: bool = False, **options: Unpack[Options]
) -> Inspection:
    """Find out which ranks two checkpoints ask for, without making an adapter.

    Args:
        base: The model before, as `extract` takes it.
        tuned: The same model after any kind of full fine-tuning.
        max_rank: How far each delta is factored.
        progress: Show a progress bar on stderr.
        **options: As `Options` has them.

    Raises:
        Exception: As `extract`.
    """
    return Inspection.of(extract(base, tuned, up_to(max_rank), keep_factors=False, progress=progress, **options))
