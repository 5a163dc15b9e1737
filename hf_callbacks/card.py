"""A page for people: the summary of a run's adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_callbacks.metrics import read_report
from peft_posthoc.adapters.card import MARK, base_of, how_to_load, refined_table
from peft_posthoc.adapters.config import read_config
from peft_posthoc.errors import brief
from peft_posthoc.text import share_of_all, size

_HEADS = ("step", "rank", "energy", "of whole", "error", "\\|d\\|/\\|w\\|", "size", "folder")


def summary(
    adapters: Mapping[int, Path],
    *,
    final: Path | None = None,
    picture: str | None = None,
    losses: Mapping[int, Mapping[str, float]] | None = None,
) -> str:
    """A table of a run's adapters, by step, what to mind of them, and how to load one.

    Args:
        adapters: Their folders.
        final: The folder of the last or best one; what refining made of it is told, if it was refined.
        picture: The file, beside the page, that shows them all.
        losses: Of evaluations, by step and name.
    """
    rows: list[tuple[int | None, Path, dict[str, Any]]]
    rows = [(step, folder, read_report(folder)) for step, folder in sorted(adapters.items())]
    if final is not None:
        report = read_report(final)
        saved = re.search(r"checkpoint-(\d{1,18})$", str(report["provenance"].get("tuned")))
        rows.append((int(saved[1]) if saved else None, final, report))
    names = list(dict.fromkeys(name for found in (losses or {}).values() for name in found))
    heads = [*_HEADS[:3], *names, *_HEADS[3:]]
    lines = [
        "# Adapters of this run",
        "",
        "Energies are shares, of the weights that are carried and of the whole fine-tune; `|d|/|w|` is the size of the "
        "delta against the base.",
        "",
        *([f"![Energy and rank over steps]({picture})", ""] if picture else []),
        f"| {' | '.join(heads)} |",
        f"|{'--:|' * (len(heads) - 1)}---|",
        *(_row(step, folder, report, names, (losses or {}).get(step or 0, {})) for step, folder, report in rows),
    ]
    if not rows:
        return "\n".join([*lines, "", MARK, ""])
    _, last, report = rows[-1]
    if "refined" in report:
        lines += ["", f"`{last.name}`, refined: its distance from the fine-tune.", "", *refined_table(report)]
    if report["warnings"]:
        lines += ["", f"Of `{last.name}`:", "", *(f"- {brief(warning)}" for warning in report["warnings"])]
    config = read_config(last)
    base = brief(base_of(config, report["provenance"]))
    revision = report["provenance"].get("base_revision")
    at = f" at revision `{revision}`" if revision else ""
    loaded = how_to_load(base, f'"path/to/this/folder/{last.name}"', config.get("task_type"))
    lines += ["", "## Load one", "", f"The base is `{base}`{at}.", "", loaded]
    return "\n".join([*lines, "", MARK, ""])


def _row(
    step: int | None, folder: Path, report: Mapping[str, Any], names: list[str], losses: Mapping[str, float]
) -> str:
    totals = report["totals"]
    cells = [
        "" if step is None else str(step),
        str(totals["rank"]),
        f"{totals['energy']:.1%}",
        *(f"{losses[name]:.4g}" if name in losses else "" for name in names),
        share_of_all(totals["energy_of_all"], totals.get("unknown", 0.0)),
        f"{totals['relative_error']:.1%}",
        "" if totals["relative_delta"] is None else f"{totals['relative_delta']:.2%}",
        size(totals["bytes"]),
        f"`{folder.name}`",
    ]
    return f"| {' | '.join(cells)} |"
