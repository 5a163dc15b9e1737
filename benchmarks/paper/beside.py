"""The paper's Tables 3 to 6 with our rows beside theirs, and its Figure 1 for our pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import Run, mean
from .task import PLAIN

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
FIGURE = "PAPER-energy.svg"
_COLUMNS = ("base", "full fine-tune", "LoRA+ r=32", "PHLoRA r=32", "PHLoRA r=64", "PHLoRA r=512")
_NAMES = {
    "tatqa": "TAT-QA",
    "mkfe": "MKFE",
    "medmcqa": "MedMCQA",
    "vqa-rad": "VQA-RAD",
    "msvd": "CaptionGen",
}
_ENERGIES = ("1", "2", "4", "8", "16", "32", "64", "128", "256", "512")


def lines(found: Sequence[Sequence[Run]]) -> list[str]:
    """A table for each set of the paper, and the energies."""
    text = [
        "## The paper's Tables 3 to 6, and ours",
        "",
        "E_r in brackets, in percent. Where the paper's tables differ, Table 3's number stands. A row of ours names",
        "its own metrics. Other fine-tunes of ours have other ranks: they are further down.",
        "",
    ]
    for task, told in PUBLISHED.items():
        ours = [_ours(runs[0]) for runs in found if runs[0].settings.task == task]
        text += [
            f"### {_NAMES[task]} ({told['metrics']})",
            "",
            f"{told['note']} {'' if ours else 'No run of ours: ' + _MISSING[task]}".strip(),
            "",
            f"| model | {' | '.join(_COLUMNS)} |",
            "|---|" + "--:|" * len(_COLUMNS),
            *(f"| {' | '.join(row)} |" for row in [*told["rows"], *ours]),
            "",
        ]
    return text + _energies(found)


_MISSING = {
    "tatqa": "none was made.",
    "mkfe": "its file is on the hub alone, which this machine does not reach.",
    "medmcqa": "its files are in a drive that this machine does not reach.",
    "vqa-rad": "its files are on the hub alone, which this machine does not reach; Easy-VQA stands in for it.",
    "msvd": "its clips are not to be had here; nor is a model that reads clips.",
}


def _ours(run: Run) -> list[str]:
    metrics = run.metrics[:2]
    cells = []
    for name in _COLUMNS:
        row = run.row(name)
        cells.append("" if row is None else _cell(row, metrics))
    return [f"**{run.settings.model}** ({' / '.join(metrics)})", *cells]


def _cell(row: dict[str, Any], metrics: Sequence[str]) -> str:
    values = [f"{mean(row, one):.2f}" if one in PLAIN else f"{100 * mean(row, one):.1f}" for one in metrics]
    return " / ".join(values) + (f" ({100 * row['energy']:.0f})" if "energy" in row else "")


def _energies(found: Sequence[Sequence[Run]]) -> list[str]:
    """Figure 1: a picture, and its numbers."""
    known = [run for runs in found for run in runs if run.spectrum is not None]
    if not known:
        return []
    return [
        "## Figure 1 for our pairs: preserved energy against rank",
        "",
        f"![Preserved energy against rank]({FIGURE})",
        "",
        "In percent, of the carried layers, weighted by energy. The stable rank is 1 / E_1: how many equal singular",
        "values would have the delta's energy. *Delta*: its norm as a share of the base's. *Carried*: the share of all",
        "that changed which is in layers that an adapter has by default; the rest is embeddings, heads and norms. The",
        "paper's pairs have 35 to 44 % at rank 32, 41 to 52 at 64 and 68 to 78 at 512.",
        "",
        f"| pair | seed | {' | '.join(f'r={rank}' for rank in _ENERGIES)} | stable rank | delta | carried |",
        "|---|--:|" + "--:|" * (len(_ENERGIES) + 3),
        *(f"| {' | '.join(_energy_row(run))} |" for run in known),
        "",
    ]


def _energy_row(run: Run) -> list[str]:
    told: dict[str, Any] = run.spectrum or {}
    at = told["energy at"]
    of_all = told["energy_of_all"] / at[max(at, key=int)]
    return [
        run.config,
        str(run.settings.seed),
        *(f"{100 * at[rank]:.1f}" if rank in at else "" for rank in _ENERGIES),
        f"{1 / at['1']:.1f}",
        f"{100 * told['relative_delta']:.2f} %",
        f"{100 * of_all:.1f} %",
    ]
