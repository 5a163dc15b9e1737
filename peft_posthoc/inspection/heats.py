"""Pictures of layers x modules: the energy that is kept there, and the share of the whole change that is there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_posthoc.inspection.drawing import heat
from peft_posthoc.inspection.found import Found
from peft_posthoc.inspection.shares import together
from peft_posthoc.text import percent

if TYPE_CHECKING:
    from jaxtyping import Float

LEAST = 1e-4
"""The share of the whole change where the colours begin."""
_MAP = "viridis"  # Of even steps in lightness, for all eyes.
_ROWS = 20  # of modules: what has less of the change is one row


def kept(figure: Any, inspection: Found) -> None:
    """Draw the energy that one rank keeps, in colours that mean the same in every report."""
    rank = heat_rank(inspection)
    modules, columns, values = matrix(inspection, {name: inspection.curves.at(name, rank) for name in inspection.cells})
    axes = heat(figure, values, modules, columns, said=_share, cmap=_MAP, vmin=0, vmax=1)
    if len(columns) <= 8 and len(modules) <= 24:
        for (y, x), value in ((at, float(values[at])) for at in product(range(len(modules)), range(len(columns)))):
            if not math.isnan(value):
                colour = "white" if value < 0.5 else "black"
                axes.text(x + 0.5, y + 0.5, f"{value:.0%}", ha="center", va="center", color=colour)
    axes.set_xlabel("layer")
    axes.set_title(f"Energy kept at rank {rank}", loc="left", fontweight="bold")


def changed(figure: Any, inspection: Found) -> None:
    """Draw where the whole change is, what is not carried included, in colours that mean the same in every report."""
    from matplotlib.colors import LogNorm

    rows, others = [*inspection.shares[:_ROWS]], inspection.shares[_ROWS:]
    if others:
        rows.append(together(f"{len(others)} others", others))
    found = {layer for row in rows for layer in row.layers}
    columns = sorted(found, key=lambda layer: math.inf if layer is None else layer)
    values = [[max(row.layers[one], LEAST) if one in row.layers else math.nan for one in columns] for row in rows]
    names = ["other" if layer is None else str(layer) for layer in columns]
    modules = [row.module for row in rows]
    axes = heat(figure, values, modules, names, said=_share, cmap=_MAP, norm=LogNorm(LEAST, 1))
    for at, row in enumerate(rows):
        place = {"transform": axes.get_yaxis_transform(), "va": "center"}
        fate = f", {row.fate}" if row.fate else ""
        axes.text(1.01, at + 0.5, f"{percent(row.of_all)}{fate}", fontsize=8.5, **place)
    axes.set_xlabel("layer")
    axes.set_title("Share of the whole change", loc="left", fontweight="bold")


def _share(value: float) -> str:
    return f"{100 * value:g}%"


def heat_rank(inspection: Found) -> int:
    """The paper's 32, or the highest power of two that was factored."""
    return min(32, 1 << (len(inspection.curves.total).bit_length() - 1))


def matrix(
    inspection: Found, values: Mapping[str, float]
) -> tuple[list[str], list[str], Float[Tensor, "modules layers"]]:
    """Modules, layers, and the mean of the values in each place: experts of a layer are one. NaN where nothing is."""
    modules = modules_of(inspection)
    layers = sorted({cell.layer for cell in inspection.cells.values() if cell.layer is not None})
    columns = [str(layer) for layer in layers]
    if any(cell.layer is None for cell in inspection.cells.values()):
        columns.append(column(None))
    sums = torch.zeros(2, len(modules), len(columns), dtype=torch.float64)
    for name, value in values.items():
        cell = inspection.cells[name]
        place = modules.index(cell.module), columns.index(column(cell.layer))
        sums[0][place] += value
        sums[1][place] += 1
    return modules, columns, sums[0] / sums[1].where(sums[1] > 0, math.nan)


def modules_of(inspection: Found) -> list[str]:
    """Modules, those of numbered layers first."""
    found = sorted(inspection.cells.values(), key=lambda cell: cell.layer is None)
    return list(dict.fromkeys(cell.module for cell in found))


def column(layer: int | None) -> str:
    """A layer under its column."""
    return "other" if layer is None else str(layer)
