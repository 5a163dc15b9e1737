"""The page of results: every number from a file that a run wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .intervals import interval, rank_correlation
from .settings import TASKS, Settings

_HEAD = """# The paper's tables, on models and data within reach

Made by `python -m benchmarks.paper page` of the files in `benchmarks/paper/results`, one for each row, which
`python -m benchmarks.paper run CONFIG --data FOLDER --work FOLDER` writes (`make paper`). A metric is a mean over the
test questions, in percent; in brackets 95 % of bootstrap samples of the questions. *To the fine-tune*: the difference
of the two, question by question, with the same interval. E_r is of the carried layers, weighted by energy, in brackets
of everything that changed.
"""


def page(results: Path) -> str:
    """All tables of which there are rows."""
    parts = [_HEAD]
    for folder in sorted(results.iterdir()) if results.is_dir() else []:
        rows = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
        if rows:
            parts.append("\n".join(_section(folder.name, rows)))
    return "\n".join(parts)


def _section(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    first = rows[0]
    settings = Settings(**first["settings"])
    task = TASKS[settings.task]
    metrics = list(first["metrics"])
    full = next((row for row in rows if row["row"] == "full fine-tune"), None)
    lines = [
        f"## {name}",
        "",
        f"{task.about}. {first['questions']} test questions of at most {settings.longest} tokens, trained on "
        f"{first['trained on']}; {settings.epochs:g} epochs, batches of {settings.batch}, learning rate {settings.lr:g} "
        f"(LoRA: {settings.lora_lr:g}), seed {settings.seed}. {first['machine']}, {rows[-1]['date']}.",
        "",
        "| model | E_r | " + " | ".join(metrics) + f" | {metrics[0]}, to the fine-tune | size | CPU seconds |",
        "|---|--:|" + "--:|" * (len(metrics) + 3),
    ]
    for row in rows:
        means = [_mean(row["metrics"][metric].values()) for metric in metrics]
        lines.append(
            f"| {row['row']} | {_energy(row)} | {' | '.join(means)} | {_against(row, full, metrics[0])} | "
            f"{row['bytes'] / 1e6:,.1f} MB | {row['seconds']:,.0f} |"
        )
    ranked = [row for row in rows if "energy" in row]
    if len(ranked) > 2:
        found = rank_correlation(
            [row["energy"] for row in ranked], [sum(row["metrics"][metrics[0]].values()) for row in ranked]
        )
        lines += ["", f"Rank correlation of E_r and {metrics[0]} over these {len(ranked)} ranks: {found:.2f}."]
    if full is not None:
        lines += ["", *_verdict(rows, full, metrics[0])]
    return [*lines, ""]


def _mean(values: Any) -> str:
    values = list(values)
    low, high = interval(values)
    return f"{100 * sum(values) / len(values):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _energy(row: Mapping[str, Any]) -> str:
    return f"{100 * row['energy']:.1f} ({100 * row['of all']:.1f})" if "energy" in row else ""


def _differences(row: Mapping[str, Any], full: Mapping[str, Any], metric: str) -> list[float]:
    of_full = full["metrics"][metric]
    return [value - of_full[key] for key, value in row["metrics"][metric].items()]


def _against(row: Mapping[str, Any], full: Mapping[str, Any] | None, metric: str) -> str:
    if full is None or row is full:
        return ""
    values = _differences(row, full, metric)
    low, high = interval(values)
    return f"{100 * sum(values) / len(values):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _verdict(rows: Sequence[Mapping[str, Any]], full: Mapping[str, Any], metric: str) -> list[str]:
    """At which rank, and with which refinement, an adapter is within a point: on these questions, and for sure."""
    near, sure = [], []
    for row in rows:
        if row["row"].startswith("PHLoRA"):
            values = _differences(row, full, metric)
            near += [row["row"]] if sum(values) / len(values) >= -0.01 else []
            sure += [row["row"]] if interval(values)[0] >= -0.01 else []
    return [
        f"Within one point of the fine-tune in {metric}, or above, on these questions: {', '.join(near) or 'none'}. "
        f"With the whole interval: {', '.join(sure) or 'none'}."
    ]
