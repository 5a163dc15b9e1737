"""Numbers of an adapter for a tracker."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from peft_posthoc.adapters.card import REPORT
from peft_posthoc.errors import AdapterError
from peft_posthoc.json_file import read_json


def read_report(adapter: Path) -> dict[str, Any]:
    """The report in an adapter's folder.

    Raises:
        AdapterError: There is none, or it is damaged: cut short, or of another version.
    """
    path = adapter / REPORT
    try:
        written = report = read_json(path)
        while "start" in report:  # it was refined: what it says of weights holds of the adapter before
            report = report["start"]
        if "refined" in written:
            report = {**report, "refined": written["refined"]}
            refined_metrics(report, step=0)
        # Whatever is read of it later is there.
        metrics(report, step=0)
        _ = report["warnings"], report["provenance"]["options"], report["totals"]["relative_delta"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise AdapterError(f"The report `{path}` is damaged: {type(error).__name__}: {error}.") from error
    return dict(report)


def metrics(report: dict[str, Any], *, step: int) -> dict[str, float]:
    """By name: of all that is carried, and of every type of module (`q_proj`, ...).

    Shares of energy are weighted by it, as everywhere: PHLoRA's E_r (eq. 5). `energy_at_8` is what the adapter would
    keep if it were cut to rank 8.
    """
    totals = report["totals"]
    found = {
        "phlora/checkpoint_step": float(step),
        "phlora/energy": totals["energy"],
        "phlora/energy_of_all": totals["energy_of_all"],
        "phlora/error": totals["relative_error"],
        "phlora/rank": totals["rank"],
        "phlora/megabytes": totals["bytes"] / 1e6,
    }
    found |= {f"phlora/energy_at_{rank}": share for rank, share in totals["energy_at"].items()}
    kept: dict[str, float] = defaultdict(float)
    whole: dict[str, float] = defaultdict(float)
    for row in report["rows"]:
        if row["status"] == "extracted":
            energy, kind = row["delta_norm"] ** 2, row["modules"][0].rpartition(".")[2]
            kept[kind] += row["energy"] * energy
            whole[kind] += energy
    found["phlora/delta_norm"] = math.sqrt(
        sum((row["delta_norm"] or 0.0) ** 2 for row in report["rows"] if "float" in row["dtype"])
    )
    for kind in whole:
        found[f"phlora/energy/{kind}"] = kept[kind] / whole[kind] if whole[kind] else 1.0
        found[f"phlora/delta_norm/{kind}"] = math.sqrt(whole[kind])
    return found


def refined_metrics(report: dict[str, Any], *, step: int) -> dict[str, float]:
    """By name: how far a refined adapter is from the tuned model, and was before, on held-out text of each kind."""
    found = {"phlora/checkpoint_step": float(step)}
    for when in ("base", "before", "after"):
        for kind, distance in report["refined"][when].items():
            found[f"phlora/kl/{kind}/{when}"] = float(distance["kl"])
            found[f"phlora/top1/{kind}/{when}"] = float(distance["top1"])
    return found


def eval_losses(history: object) -> dict[int, dict[str, float]]:
    """By step and name, the losses of evaluations in a trainer's history: `eval_loss`, or one for each data set."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for row in history if isinstance(history, list) else ():
        if isinstance(row, dict) and isinstance(step := row.get("step"), int):
            losses = {name: value for name, value in row.items() if re.fullmatch(r"eval_(.+_)?loss", str(name))}
            found[step] |= {name: float(value) for name, value in losses.items() if isinstance(value, int | float)}
    return {step: losses for step, losses in found.items() if losses}
