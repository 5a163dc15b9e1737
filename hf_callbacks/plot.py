"""A run's adapters as a picture: what they keep, and at which rank, over the steps of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_callbacks.metrics import read_report
from peft_posthoc.errors import MissingExtraError


def plot(adapters: Mapping[int, Path], losses: Mapping[int, Mapping[str, float]] | None = None) -> Any:
    """Draw energy, the losses of evaluations if there were any, and rank over steps.

    Args:
        adapters: Their folders, by step.
        losses: By step and name.

    Returns:
        A figure of matplotlib's.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Plots need matplotlib: `pip install 'peft-posthoc[plot]'`.") from error
    steps = sorted(adapters)
    totals = [read_report(adapters[step])["totals"] for step in steps]
    figure = Figure(figsize=(8, 6), layout="constrained")
    parts = figure.subplots(3 if losses else 2, 1, sharex=True, height_ratios=[3, 1, 1] if losses else [3, 1])
    above, *middle, below = parts
    above.plot(steps, [each["energy"] for each in totals], "k.-", linewidth=2, label="kept")
    above.plot(steps, [each["energy_of_all"] for each in totals], "k.:", label="kept, of the whole fine-tune")
    for rank in sorted({int(rank) for each in totals for rank in each["energy_at"]}, reverse=True):
        # An adapter of a lower rank has no more to give than all of it.
        shares = [each["energy_at"].get(str(rank), each["energy"]) for each in totals]
        above.plot(steps, shares, ".-", linewidth=0.8, label=f"at rank {rank}")
    above.set(ylabel="energy, $E_r$", ylim=(0, 1.02), title="Preserved energy over training")
    above.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    above.legend(fontsize="small", ncols=2)
    for axes in middle:
        for name in dict.fromkeys(name for found in (losses or {}).values() for name in found):
            known = {step: found[name] for step, found in sorted((losses or {}).items()) if name in found}
            axes.plot(list(known), list(known.values()), ".-", linewidth=0.8, label=name)
        axes.set(ylabel="loss")
        axes.legend(fontsize="small")
    ranks = [each["rank"] for each in totals]
    below.plot(steps, ranks, "k.-")
    below.set(xlabel="step", ylabel="rank kept", ylim=(0, 1.2 * max(ranks)))
    for axis in (below.xaxis, below.yaxis):
        axis.get_major_locator().set_params(integer=True)
    for axes in parts:
        axes.grid(alpha=0.3)
    return figure
