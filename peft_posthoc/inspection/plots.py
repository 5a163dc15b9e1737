"""Pictures of an inspection: energy against rank (PHLoRA, Figure 1), energy over layers x modules, ranks of rules."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from peft_posthoc.inspection.answers import Candidate
from peft_posthoc.inspection.drawing import (
    INK,
    LAYERS,
    SIZE,
    STYLE,
    called,
    check_format,
    require,
    saved,
    short,
    svg,
    ticks,
)
from peft_posthoc.inspection.found import Found
from peft_posthoc.inspection.heats import changed, column, kept, matrix, modules_of
from peft_posthoc.inspection.sizes import against_size
from peft_posthoc.ranks.rules import above_noise, keep_energy

# Okabe and Ito's colours, which those who do not see all colours tell apart too; without black, which is the total's,
# and yellow, which is lost on white. Beyond seven modules the lines are dashed.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D46")
_DASHES = ("-", "--", ":", "-.")
_OTHERS = {"color": "#9aa0a6", "alpha": 0.6}
_NAMED = 12  # modules in a legend
_LETTERS = 88  # beside one another in a legend
_POINTS = 48  # of a curve: more are not seen
_WHAT: dict[type, str] = {
    keep_energy: "Each layer gets what holds the same share of its own energy.",
    above_noise: "Each layer gets what stands out of the noise that the checkpoints carry.",
}


def picture(inspection: Found, suffix: str = ".png") -> bytes:
    """All plots in one picture, under the names of the two models and the day that it was drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: It knows no such format.
    """
    check_format(suffix)
    import matplotlib
    from matplotlib.figure import Figure

    drawn = [draw for draw, _ in plots(inspection).values()]
    with matplotlib.rc_context(STYLE | {"text.color": "black", "svg.hashsalt": "picture"}):
        rows = -(-len(drawn) // 2)
        figure: Any = Figure(figsize=(2 * SIZE[0], rows * SIZE[1] + 0.4), layout="constrained")
        figure.suptitle(heading(inspection), x=0.01, ha="left")
        for draw, part in zip(drawn, figure.subfigures(rows, 2).flat, strict=False):
            draw(part, inspection)
        return saved(figure, suffix.removeprefix(".").lower() or "png", dpi=110)


def heading(inspection: Found) -> str:
    """Which models a picture is of, and when it was drawn."""
    made = inspection.report.provenance
    pair = " → ".join(short(called(made[name]), 60) for name in ("base", "tuned"))
    return f"{pair}, {datetime.date.today().isoformat()}"


def drawings(inspection: Found) -> dict[str, tuple[str, str]]:
    """Each plot as SVG that can stand in a page, in the colour of its text, and its caption; by what it shows.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require()
    drawn = plots(inspection).items()
    return {title: (svg(title, partial(draw, inspection=inspection)), told) for title, (draw, told) in drawn}


def plots(inspection: Found) -> dict[str, tuple[Callable[..., None], str]]:
    """The plots and their captions, by title."""
    top = len(inspection.curves.total)
    found: dict[str, tuple[Callable[..., None], str]] = {
        "Energy against rank": (
            _energy,
            "E_r, the share of the squared norm of the change that the best rank r keeps: all together, and each kind "
            "of module (the median of its layers, and from the lowest to the highest).",
        ),
        "Energy against size": (
            against_size,
            "What the adapter of each rule keeps and takes: filled in the portable form, hollow in the peft form.",
        ),
        "Energy over layers and modules": (
            kept,
            "Bright: few directions hold the change. Dark: it is spread over many. The colours of every report are "
            "the same.",
        ),
        "The whole change over layers and modules": (
            changed,
            "Where the fine-tune changed the model, in steps of ten, and on the right in all layers together. The "
            "colours of every report are the same.",
        ),
    }
    for rule in _rules(inspection):
        triangles = f" Triangles: higher than {top}, where the factorization ended." if rule.beyond else ""
        told = f"{_WHAT.get(type(rule.rule), '')}{triangles}"
        found[f"Ranks of {rule.flags}"] = (partial(_allocation, rule=rule), told)
    return found


def _styles(inspection: Found) -> dict[str, dict[str, Any]]:
    """By module: how its lines look, the same in every plot. Of many, those that hold least of the change are alike."""
    modules = modules_of(inspection)
    named = sorted(modules, key=inspection.energy_of, reverse=True)[:_NAMED]
    looks = (
        {"color": _COLOURS[at % len(_COLOURS)], "linestyle": _DASHES[at // len(_COLOURS) % len(_DASHES)]}
        for at in range(len(named))
    )
    return {module: next(looks) if module in named else _OTHERS for module in modules}


def _legend(figure: Any, styles: Mapping[str, Mapping[str, Any]], *, total: bool = False) -> None:
    from matplotlib.lines import Line2D

    # A name that begins with `_` would be left out.
    shown = [(f"\N{ZERO WIDTH SPACE}{short(name)}", style) for name, style in styles.items() if style is not _OTHERS]
    if others := len(styles) - len(shown):
        shown.append((f"{others} others", _OTHERS))
    if total:
        shown.insert(0, ("total", {"color": INK}))
    names = [name for name, _ in shown]
    lines = [Line2D([], [], **{"linewidth": 2, **style}) for _, style in shown]
    columns = min(4, len(names), max(1, _LETTERS // (6 + max(map(len, names)))))
    figure.legend(lines, names, loc="outside lower center", ncols=columns, handlelength=1.6)


def _energy(figure: Any, inspection: Found) -> None:
    curves, styles = inspection.curves, _styles(inspection)
    axes = figure.add_subplot()
    shown = _spread_out(len(curves.total))
    for module, style in styles.items():
        group = torch.stack(
            [
                curve[(torch.tensor(shown).clamp(max=len(curve)) - 1)]
                for name, curve in curves.layers.items()
                if inspection.cells[name].module == module
            ]
        )
        axes.fill_between(
            shown,
            group.amin(dim=0).tolist(),
            group.amax(dim=0).tolist(),
            color=style["color"],
            alpha=0.08,
            linewidth=0,
        )
        axes.plot(shown, group.median(dim=0).values.tolist(), linewidth=1.3, **style)
    axes.plot(shown, [float(curves.total[rank - 1]) for rank in shown], color=INK, linewidth=2.2)
    for share in (0.5, 0.9):
        reached = int((curves.total < share).sum()) + 1
        if 1 < reached <= len(curves.total):
            point = (reached, float(curves.total[reached - 1]))
            axes.plot(*point, "o", color=INK, markersize=4.5)
            axes.annotate(f"{share:.0%} at {reached}", point, (6, -11), textcoords="offset points", fontweight="bold")
    _rank_axis(axes.xaxis)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(xlabel="rank", ylabel="energy kept, E_r", ylim=(0, 1.02), xlim=(1, max(shown[-1], 2)))
    axes.set_title("Energy against rank", loc="left", fontweight="bold")
    axes.grid(True)
    _legend(figure, styles, total=True)


def _allocation(figure: Any, inspection: Found, rule: Candidate) -> None:
    styles = _styles(inspection)
    axes = figure.add_subplot()
    modules, columns, values = matrix(inspection, rule.ranks)
    for module, row in zip(modules, values, strict=True):
        at = [x + 0.5 for x, value in enumerate(row.tolist()) if not math.isnan(value)]
        size = 2.2 if len(at) > 12 else 3.5
        axes.plot(at, row[~row.isnan()].tolist(), marker="o", markersize=size, linewidth=1.1, **styles[module])
    ended = [(inspection.cells[name], rule.ranks[name]) for name in sorted(rule.beyond)]
    at = [columns.index(column(cell.layer)) + 0.5 for cell, _ in ended]
    axes.plot(at, [rank for _, rank in ended], "^", color=INK, markersize=4.5, markerfacecolor="none")
    # The same range for all rules: drawings are compared.
    ranks = [rank for one in _rules(inspection) for rank in one.ranks.values()]
    low, high = math.floor(math.log2(min(ranks)) - 0.01), math.ceil(math.log2(max(ranks)) + 0.01)
    _rank_axis(axes.yaxis)
    axes.set(xlim=(0, len(columns)), ylim=(2.0**low, 2.0**high), ylabel="rank")
    axes.set_title(f"Ranks of {rule.flags}", loc="left", fontweight="bold")
    axes.grid(True)
    ticks(axes.xaxis, columns, LAYERS)
    axes.set_xlabel("layer")
    _legend(figure, styles)


def _rules(inspection: Found) -> list[Candidate]:
    """Rules whose ranks are drawn: one by energy, and beside it that of the noise, or what was written at several."""
    first, *_ = inspection.candidates
    written = first.rule is None and len(set(first.ranks.values())) > 1
    beside = inspection.measured() or (first if written else None)
    return [inspection.telling(), *([beside] if beside else [])]


def _rank_axis(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=2)
    axis.set_major_locator(LogLocator(base=2, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _spread_out(top: int) -> list[int]:
    """Ranks from 1 to `top`, evenly on a logarithmic axis."""
    if top == 1:
        return [1]
    return sorted({round(top ** (i / (_POINTS - 1))) for i in range(_POINTS)})
