"""Pictures of an inspection: energy against rank (PHLoRA, Figure 1), energy over layers x modules, ranks of rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_posthoc.inspection.answers import Candidate
from peft_posthoc.inspection.drawing import INK, SIZE, STYLE, check_format, require, saved, short, svg
from peft_posthoc.inspection.found import Found
from peft_posthoc.ranks.rules import above_noise, keep_energy

if TYPE_CHECKING:
    from jaxtyping import Float

# Okabe and Ito's colours, which those who do not see all colours tell apart too; without black, which is the total's,
# and yellow, which is lost on white. Beyond seven modules the lines are dashed.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D46")
_DASHES = ("-", "--", ":", "-.")
_MAP = "viridis"  # Of even steps in lightness, for all eyes.
_POINTS = 48  # of a curve: more are not seen
_WHAT: dict[type, str] = {
    keep_energy: "Each layer gets what holds the same share of its own energy.",
    above_noise: "Each layer gets what stands out of the noise that the checkpoints carry.",
}


def picture(inspection: Found, suffix: str = ".png") -> bytes:
    """All plots in one picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: It knows no such format.
    """
    check_format(suffix)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"text.color": "black", "svg.hashsalt": "picture"}):
        figure: Any = Figure(figsize=(2 * SIZE[0], 2 * SIZE[1]), layout="constrained")
        rules = _rules(inspection)
        top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1))
        left, right = top.subfigures(1, 2)
        _energy(left, inspection)
        _heat(right, inspection)
        for part, rule in zip(bottom.subfigures(1, len(rules), squeeze=False)[0], rules, strict=True):
            _allocation(part, inspection, rule)
        return saved(figure, suffix.removeprefix(".").lower() or "png", dpi=110)


def drawings(inspection: Found) -> dict[str, str]:
    """Each plot as SVG that can stand in a page, in the colour of its text, by what it shows.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require()
    drawn = [("Energy against rank", _energy), ("Energy over layers and modules", _heat)]
    drawn += [(f"Ranks of {rule.flags}", partial(_allocation, rule=rule)) for rule in _rules(inspection)]
    return {title: svg(title, partial(draw, inspection=inspection)) for title, draw in drawn}


def captions(inspection: Found) -> dict[str, str]:
    """Captions that help to read each of `drawings`."""
    top = len(inspection.curves.total)
    told = {
        "Energy against rank": "E_r, the share of the squared norm of the change that the best rank r keeps: all "
        "together, and each kind of module (the median of its layers, and from the lowest to the highest).",
        "Energy over layers and modules": "Bright: few directions hold the change. Dark: it is spread over many.",
    }
    for rule in _rules(inspection):
        triangles = f" Triangles: higher than {top}, where the factorization ended." if rule.beyond else ""
        told[f"Ranks of {rule.flags}"] = f"{_WHAT.get(type(rule.rule), '')}{triangles}"
    return told


def _styles(inspection: Found) -> dict[str, dict[str, Any]]:
    """By module: how its lines look, the same in every plot."""
    return {
        module: {
            "color": _COLOURS[at % len(_COLOURS)],
            "linestyle": _DASHES[at // len(_COLOURS) % len(_DASHES)],
        }
        for at, module in enumerate(_modules(inspection))
    }


def _modules(inspection: Found) -> list[str]:
    """Modules, those of numbered layers first."""
    found = sorted(inspection.cells.values(), key=lambda cell: cell.layer is None)
    return list(dict.fromkeys(cell.module for cell in found))


def _legend(figure: Any, styles: Mapping[str, Mapping[str, Any]], *, total: bool = False) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], linewidth=2, **style) for style in styles.values()]
    names = [short(name) for name in styles]
    if total:
        lines, names = [Line2D([], [], color=INK, linewidth=2.5), *lines], ["total", *names]
    # A name that begins with `_` would be left out.
    names = [f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name for name in names]
    figure.legend(lines, names, loc="outside lower center", ncols=min(4, len(names)), handlelength=1.6)


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


def _heat(figure: Any, inspection: Found) -> None:
    rank = _heat_rank(inspection)
    modules, columns, values = _matrix(
        inspection, {name: inspection.curves.at(name, rank) for name in inspection.cells}
    )
    axes = figure.add_subplot()
    low, high = (float(x) for x in (values[~values.isnan()].min(), values[~values.isnan()].max()))
    middle, half = (low + high) / 2, max((high - low) / 2, 0.05)
    mesh = axes.pcolormesh(
        values.numpy(),
        cmap=_MAP,
        vmin=max(middle - half, 0),
        vmax=min(middle + half, 1),
        edgecolors="face",
        linewidth=0.3,
    )
    axes.invert_yaxis()
    if len(columns) <= 8:
        for (y, x), value in ((at, float(values[at])) for at in product(range(len(modules)), range(len(columns)))):
            if not math.isnan(value):
                dark = value < middle
                axes.text(
                    x + 0.5, y + 0.5, f"{value:.0%}", ha="center", va="center", color="white" if dark else "black"
                )
    axes.set_yticks([y + 0.5 for y in range(len(modules))], [short(name) for name in modules])
    _layer_axis(axes, columns)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(f"Energy kept at rank {rank}", loc="left", fontweight="bold")
    bar = figure.colorbar(mesh, ax=axes, location="bottom", shrink=0.8, aspect=35, pad=0.03)
    bar.ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)


def _allocation(figure: Any, inspection: Found, rule: Candidate) -> None:
    styles = _styles(inspection)
    axes = figure.add_subplot()
    modules, columns, values = _matrix(inspection, rule.ranks)
    for module, row in zip(modules, values, strict=True):
        at = [x + 0.5 for x, value in enumerate(row.tolist()) if not math.isnan(value)]
        size = 2.2 if len(at) > 12 else 3.5
        axes.plot(at, row[~row.isnan()].tolist(), marker="o", markersize=size, linewidth=1.1, **styles[module])
    ended = [(inspection.cells[name], rule.ranks[name]) for name in sorted(rule.beyond)]
    at = [columns.index(_column(cell.layer)) + 0.5 for cell, _ in ended]
    axes.plot(at, [rank for _, rank in ended], "^", color=INK, markersize=4.5, markerfacecolor="none")
    # The same range for all rules: drawings are compared.
    ranks = [rank for one in _rules(inspection) for rank in one.ranks.values()]
    low, high = math.floor(math.log2(min(ranks)) - 0.01), math.ceil(math.log2(max(ranks)) + 0.01)
    _rank_axis(axes.yaxis)
    axes.set(xlim=(0, len(columns)), ylim=(2.0**low, 2.0**high), ylabel="rank")
    axes.set_title(f"Ranks of {rule.flags}", loc="left", fontweight="bold")
    axes.grid(True)
    _layer_axis(axes, columns)
    _legend(figure, styles)


def _rules(inspection: Found) -> list[Candidate]:
    """Rules whose ranks are drawn: one by energy, and beside it that of the noise, or what was written at several."""
    first, *_ = inspection.candidates
    written = first.rule is None and len(set(first.ranks.values())) > 1
    beside = inspection.measured() or (first if written else None)
    return [inspection.telling(), *([beside] if beside else [])]


def _heat_rank(inspection: Found) -> int:
    """The paper's 32, or the highest power of two that was factored."""
    return min(32, 1 << (len(inspection.curves.total).bit_length() - 1))


def _matrix(
    inspection: Found, values: Mapping[str, float]
) -> tuple[list[str], list[str], Float[Tensor, "modules layers"]]:
    """Modules, layers, and the mean of the values in each place: experts of a layer are one. NaN where nothing is."""
    modules = _modules(inspection)
    layers = sorted({cell.layer for cell in inspection.cells.values() if cell.layer is not None})
    columns = [str(layer) for layer in layers]
    if any(cell.layer is None for cell in inspection.cells.values()):
        columns.append(_column(None))
    sums = torch.zeros(2, len(modules), len(columns), dtype=torch.float64)
    for name, value in values.items():
        cell = inspection.cells[name]
        place = modules.index(cell.module), columns.index(_column(cell.layer))
        sums[0][place] += value
        sums[1][place] += 1
    return modules, columns, sums[0] / sums[1].where(sums[1] > 0, math.nan)


def _column(layer: int | None) -> str:
    return "other" if layer is None else str(layer)


def _layer_axis(axes: Any, columns: Sequence[str]) -> None:
    step = max(1, 1 << max(0, math.ceil(math.log2(len(columns) / 12))))
    shown = [x for x, column in enumerate(columns) if x % step == 0 or column == _column(None)]
    axes.set_xticks([x + 0.5 for x in shown], [columns[x] for x in shown])
    axes.set_xlabel("layer")


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
