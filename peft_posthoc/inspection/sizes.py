"""A picture of what energy costs: what each rule's adapter keeps, against its size."""

from __future__ import annotations

from typing import Any

from peft_posthoc.inspection.drawing import INK
from peft_posthoc.inspection.found import Found
from peft_posthoc.ranks.budget import budget
from peft_posthoc.ranks.rules import above_noise, fixed, keep_energy, keep_error
from peft_posthoc.text import size

# By rule: its words, and how its adapters are marked. None is what was written.
_LOOKS: dict[type, tuple[str, str, str]] = {
    fixed: ("--rank", "o", INK),
    keep_energy: ("--energy", "s", "#D55E00"),
    keep_error: ("--error", "D", "#CC79A7"),
    budget: ("--budget", "v", "#009E73"),
    above_noise: ("auto", "*", "#0072B2"),
    type(None): ("written", "P", "#E69F00"),
}


def against_size(figure: Any, inspection: Found) -> None:
    """Draw E_r against bytes of each rule's adapter, in both forms, and where the fine-tune itself takes less."""
    axes = figure.add_subplot()
    for kind, (label, marker, colour) in _LOOKS.items():
        own = [one for one in inspection.candidates if type(one.rule) is kind and one.ranks]
        look = {"marker": marker, "color": colour, "markersize": 5, "linewidth": 1.1}
        portable = [one for one in own if one.portable]
        if portable:
            axes.plot([one.portable for one in portable], [one.energy for one in portable], label=label, **look)
        alone = [one for one in own if one.peft and one.peft != one.portable]
        if alone:
            told = None if portable else label
            hollow = look | {"markerfacecolor": "none", "linestyle": ":"}
            axes.plot([one.peft for one in alone], [one.energy for one in alone], label=told, **hollow)
        for one in (portable or alone) if kind is fixed else ():
            place = (inspection.bytes(one), one.energy)
            axes.annotate(one.flags.split()[-1], place, (5, -10), textcoords="offset points", fontsize=8.5)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high > inspection.tuned_bytes:
        axes.axvspan(inspection.tuned_bytes, high, color=INK, alpha=0.1, linewidth=0)
        axes.annotate(
            "larger than the fine-tune",
            (inspection.tuned_bytes, 0.02),
            (4, 0),
            textcoords="offset points",
            fontsize=8.5,
            rotation=90,
        )
    axes.set_xlim(low, high)
    _size_axis(axes)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(xlabel="size of the adapter", ylabel="energy kept, E_r", ylim=(0, 1.02))
    axes.set_title("Energy against size", loc="left", fontweight="bold")
    axes.grid(True)
    figure.legend(loc="outside lower center", ncols=6, handlelength=1.6)


def _size_axis(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: size(value).replace(".0 ", " "))
