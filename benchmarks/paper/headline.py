"""The README's table: the base, its full fine-tune, and what adapters of it score."""

from __future__ import annotations

from pathlib import Path

from .results import mean, read

CONFIG = "smollm2-tatqa"
_NAMES = {"base": "base", "full fine-tune": "tuned, all weights"}


def headline(results: Path) -> str:
    """A row for the base, the fine-tune, and each adapter of the two checkpoints."""
    (run,) = next(runs for runs in read(results) if runs[0].config == CONFIG)
    metrics = run.metrics[:2]
    lines = [f"| model | E_r | of whole delta | {' | '.join(metrics)} | size |", "|---|--:|--:|--:|--:|--:|"]
    for row in run.rows:
        name = _NAMES.get(row["row"]) or row["row"].replace("PHLoRA r=", "adapter, rank ")
        if row["row"] not in _NAMES and not row["row"].startswith("PHLoRA"):
            continue
        energies = [f"{100 * row[key]:.1f}" if "energy" in row else "" for key in ("energy", "of all")]
        scores = [f"{100 * mean(row, metric):.1f}" for metric in metrics]
        lines.append(f"| {name} | {' | '.join((*energies, *scores))} | {row['bytes'] / 1e6:,.0f} MB |")
    return "\n".join(lines)
