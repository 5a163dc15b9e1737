"""The paper's Figure 1 for our pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .results import Run


def draw(found: Sequence[Sequence[Run]], out: Path) -> None:
    """Energy against rank, a line for each fine-tune; the paper's range at its ranks."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "paper"  # The same bytes each time.
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for color, runs in enumerate(found):
        for run in runs:
            if run.spectrum is not None:
                ranks = sorted(map(int, run.spectrum["energy at"]))
                shares = [100 * run.spectrum["energy at"][str(rank)] for rank in ranks]
                label = run.config if run is runs[0] else None
                axes.plot(ranks, shares, color=f"C{color}", label=label, linewidth=1.2, marker=".")
    for rank, low, high in ((32, 35, 44), (64, 41, 52), (512, 68, 78)):
        label = "the paper's pairs" if rank == 32 else None
        axes.plot([rank, rank], [low, high], color="black", linewidth=4, alpha=0.5, label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="rank", ylabel="preserved energy, %", ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
