"""Drawings by matplotlib: their look, and how they come into a file or a page."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from peft_posthoc.errors import MissingExtraError

# Stands for the text's colour until the page's own, of day or night, takes its place.
INK = "#010203"
SIZE = (6.2, 4.1)  # inches
LAYERS = 12  # names of layers along a drawing
_ROWS = 24  # names beside one: more are not told apart
STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9.5,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # A dollar in a name is a dollar.
    "xtick.color": INK,
    "ytick.color": INK,
}


def require() -> None:
    """See that there is matplotlib.

    Raises:
        MissingExtraError: There is none.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("Plots need matplotlib: `pip install 'peft-posthoc[plot]'`.") from error


def check_format(suffix: str) -> None:
    """See that matplotlib can write a file of this suffix.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: matplotlib does not know the format.
    """
    require()
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if suffix and suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"A picture cannot be a `{suffix}` file. Choose one of {', '.join(sorted(known))}.")


def saved(figure: Any, kind: str, **options: Any) -> bytes:
    """The bytes of a file of that kind."""
    # Of the same numbers, the same bytes: no dates.
    dated = {
        "png": {},
        "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
        "pdf": {"CreationDate": None},
    }
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=dated.get(kind), **options)
    return file.getvalue()


def _for_page(svg: str) -> str:
    """One element, in the colour of the text around it, as wide as its place, with no names that others have too."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)


def svg(title: str, draw: Callable[[Any], None]) -> str:
    """A drawing as SVG that can stand in a page, in the colour of its text.

    Args:
        title: Names within a drawing are made of it: those of several in one page must differ.
        draw: Draws into a figure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=SIZE, layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        return _for_page(saved(figure, "svg", transparent=True).decode())


def short(name: str, width: int = 28) -> str:
    """A name without its beginning, if it is longer."""
    return name if len(name) <= width else f"…{name[-(width - 1) :]}"


def called(label: str) -> str:
    """What a model is called: the end of a path; the whole of anything else."""
    return PurePath(label).name if os.path.isabs(label) else label


def ticks(axis: Any, names: Sequence[str], most: int, *, width: int = 28) -> None:
    """Write names at the middle of each place, the last one and as many others as there is room for."""
    last, step = len(names) - 1, 1 << max(0, math.ceil(math.log2(len(names) / most)))
    shown = [at for at in range(0, len(names), step) if last - at >= step or at == last]
    shown += [last] if shown[-1:] != [last] else []
    axis.set_ticks([at + 0.5 for at in shown], [short(names[at], width) for at in shown])


def heat(
    figure: Any,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    said: Callable[[float], str] = "{:g}".format,
    **look: Any,
) -> Any:
    """Draw a table in colours, with a bar that tells what they mean.

    Args:
        figure: Drawn into.
        values: A list for each row; NaN is left blank.
        rows: Their names.
        columns: Their names.
        said: How a value is written beside the bar.
        **look: As matplotlib's `pcolormesh` takes it.

    Returns:
        The axes.
    """
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(values, edgecolors="face", linewidth=0.3, **look)
    axes.invert_yaxis()
    ticks(axes.yaxis, rows, _ROWS)
    upright = max(map(len, columns)) > 5
    ticks(axes.xaxis, columns, _ROWS if upright else LAYERS, width=20)
    axes.xaxis.set_tick_params(rotation=90 if upright else 0)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, location="bottom", shrink=0.8, aspect=35, pad=0.03)
    bar.ax.xaxis.set_major_formatter(lambda value, _: said(value))
    bar.outline.set_visible(False)
    return axes
