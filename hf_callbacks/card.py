"""A page for people: the summary of a run's adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_callbacks.metrics import read_report
from peft_posthoc.adapters.card import MARK, refined_table
from peft_posthoc.text import share_of_all, size


def summary(adapters: Mapping[int, Path], *, final: Path | None = None, picture: str | None = None) -> str:
    """A table of a run's adapters, by step.

    Args:
        adapters: Their folders.
        final: The folder of the last or best one; what refining made of it is told, if it was refined.
        picture: The file, beside the page, that shows them all.
    """
    lines = [
        "# Adapters of this run",
        "",
        "Energies are shares, of the weights that are carried and of the whole fine-tune; `|d|/|w|` is the size of the "
        "delta against the base.",
        "",
        *([f"![Energy and rank over steps]({picture})", ""] if picture else []),
        "| step | rank | energy | of whole | error | \\|d\\|/\\|w\\| | size | folder |",
        "|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for step, folder in sorted(adapters.items()):
        totals: Mapping[str, Any] = read_report(folder)["totals"]
        moved = "" if totals["relative_delta"] is None else f"{totals['relative_delta']:.2%}"
        lines.append(
            f"| {step} | {totals['rank']} | {totals['energy']:.1%} "
            f"| {share_of_all(totals['energy_of_all'], totals.get('unknown', 0.0))} "
            f"| {totals['relative_error']:.1%} | {moved} | {size(totals['bytes'])} | `{folder.name}` |"
        )
    report = read_report(final) if final is not None else {}
    if "refined" in report:
        lines += ["", "`final`, refined: its distance from the fine-tune.", "", *refined_table(report)]
    return "\n".join([*lines, "", MARK, ""])
