"""The page of results: every number from a file that a run wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import beside, open_questions
from .intervals import interval
from .results import Run, differences, read
from .settings import TASKS
from .task import PLAIN

_HEAD = """# The paper's tables, on models and data within reach

Made by `python -m benchmarks.paper page` of the files in `benchmarks/paper/results`, one for each row, which
`python -m benchmarks.paper run CONFIG --data FOLDER --work FOLDER` writes (`make paper`). A metric is a mean over the
test questions, in percent (CIDEr from 0 to 10, a margin in nats); in brackets 95 % of bootstrap samples of the
questions, or, where there are several seeds, the least and the most of these. *To the fine-tune*: the difference of the
two, question by question, with the same brackets. E_r is of the carried layers, weighted by energy, in brackets of
everything that changed. CPU seconds are of the last process that worked on a row: what ran before an interruption is
not counted.

Changed after a look at first results: which of Easy-VQA's questions are asked (those for yes or no, then for shapes,
at last for colours), how many questions MiniLM and the preferences are trained on (so that a run takes minutes), and
the texts that refining takes (160). Nothing was changed to favour a row over another.

PEFT's `convert_to_lora` has no row: it takes layers of PEFT that hold a delta, not two checkpoints. A full delta, put
into such layers by hand, it would factor by the same truncated SVD that PHLoRA's rows are made by.
"""


def page(results: Path) -> str:
    """All tables of which there are rows."""
    found = list(read(results))
    ours = [line for runs in found for line in _section(runs)]
    return "\n".join([_HEAD, *beside.lines(found), *ours, *open_questions.lines(found)]).rstrip() + "\n"


def _section(runs: Sequence[Run]) -> list[str]:
    first = runs[0]
    settings, metrics, told = first.settings, first.metrics, first.rows[0]
    seeds = [run.settings.seed for run in runs]
    lines = [
        f"## {first.config}",
        "",
        f"{TASKS[settings.task].about}. {told['questions']} test questions of at most {settings.longest} tokens, "
        f"trained on {told['trained on']}; {settings.epochs:g} epochs, batches of {settings.batch}, learning rate "
        f"{settings.lr:g} (LoRA: {settings.lora_lr:g}), seed {', '.join(map(str, seeds))}. {told['machine']}, "
        f"{first.rows[-1]['date']}.",
        "",
        "| model | E_r | " + " | ".join(metrics) + f" | {metrics[0]}, to the fine-tune | size | CPU seconds |",
        "|---|--:|" + "--:|" * (len(metrics) + 3),
    ]
    for name in dict.fromkeys(row["row"] for run in runs for row in run.rows):
        of_run = [(run, row) for run in runs if (row := run.row(name)) is not None]
        rows = [row for _, row in of_run]
        seconds = sum(row["seconds"] for row in rows) / len(rows)
        means = [told_of([list(row["metrics"][metric].values()) for row in rows], metric) for metric in metrics]
        lines.append(
            f"| {name} | {_energy(rows)} | {' | '.join(means)} | {_against(of_run, metrics[0])} | "
            f"{rows[0]['bytes'] / 1e6:,.1f} MB | {seconds:,.0f} |"
        )
    return [*lines, "", *_verdict(runs, metrics[0])]


def told_of(values: Sequence[Sequence[float]], metric: str, sign: str = "") -> str:
    """A mean over questions, of one run with its interval, of several with the least and the most."""
    each = [sum(one) / len(one) for one in values]
    low, high = (min(each), max(each)) if len(each) > 1 else interval(values[0])
    scale, digits = (1, 2) if metric in PLAIN else (100, 1)
    middle, low, high = (f"{scale * value:{sign}.{digits}f}" for value in (sum(each) / len(each), low, high))
    return f"{middle} ({low} to {high})"


def _energy(rows: Sequence[dict[str, Any]]) -> str:
    if "energy" not in rows[0]:
        return ""
    energy, of_all = (sum(row[name] for row in rows) / len(rows) for name in ("energy", "of all"))
    return f"{100 * energy:.1f} ({100 * of_all:.1f})"


def _against(of_run: Sequence[tuple[Run, dict[str, Any]]], metric: str) -> str:
    full = [run.row("full fine-tune") for run, _ in of_run]
    values = [
        differences(row, one, metric) for (_, row), one in zip(of_run, full, strict=True) if one and one is not row
    ]
    return told_of(values, metric, "+") if values else ""


def _verdict(runs: Sequence[Run], metric: str) -> list[str]:
    """At which rank, and with which refinement, an adapter is within a point: on these questions, and for sure."""
    if metric in PLAIN or any(run.row("full fine-tune") is None for run in runs):
        return []
    near, sure = [], []
    for name in dict.fromkeys(row["row"] for row in runs[0].rows if row["row"].startswith("PHLoRA")):
        pairs = [(run.row(name), run.row("full fine-tune")) for run in runs]
        values = [differences(row, full, metric) for row, full in pairs if row and full]
        near += [name] if all(sum(one) / len(one) >= -0.01 for one in values) else []
        sure += [name] if all(interval(one)[0] >= -0.01 for one in values) else []
    of_all = "" if len(runs) == 1 else ", with every seed"
    return [
        f"Within one point of the fine-tune in {metric}, or above{of_all}, on these questions: "
        f"{', '.join(near) or 'none'}. With the whole interval: {', '.join(sure) or 'none'}.",
        "",
    ]
