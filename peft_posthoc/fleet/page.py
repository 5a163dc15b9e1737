"""A fleet as one page of HTML that needs nothing else: no network, no other file."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from peft_posthoc.fleet.found import Found
from peft_posthoc.inspection.drawing import INK, heat, require, svg
from peft_posthoc.inspection.page import rendered

_WHERE = "What changed where"
_ALIKE = "Who is alike"
_BASIS = "One basis for all"
_CAPTIONS = {
    _WHERE: "The norm of the change in each layer, against that of its weights in the base.",
    _ALIKE: "The cosine between the deltas of the adapters, all modules together: 1 is the same direction, 0 none in "
    "common.",
    _BASIS: "The mean share of the adapters' energy that is left where all have one lora_A of that rank in each "
    "module, the best for all of them, and each its own lora_B. Dotted: the rank that each has for itself.",
}


def page(fleet: Found) -> str:
    """The page's HTML.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require()
    drawn = {_WHERE: partial(_where, fleet=fleet)} if fleet.layers() else {}
    if fleet.comparison and len(fleet.comparison.names) > 1:
        drawn[_ALIKE] = partial(_alike, fleet=fleet)
        if fleet.comparison.shared:
            drawn[_BASIS] = partial(_basis, fleet=fleet)
    drawings = {title: svg(title, draw) for title, draw in drawn.items()}
    return rendered("peft_posthoc.fleet", fleet=fleet, drawings=drawings, captions=_CAPTIONS)


def _where(figure: Any, fleet: Found) -> None:
    good, layers = [one for one in fleet.members if one.error is None], fleet.layers()
    changed = [one.changed() for one in good]
    values = [[each.get(layer, math.nan) for layer in layers] for each in changed]
    axes = heat(figure, values, [one.name for one in good], layers, said="{:.1%}".format, cmap="viridis", vmin=0)
    axes.set_xlabel("layer")


def _alike(figure: Any, fleet: Found) -> None:
    compared = fleet.comparison
    assert compared is not None
    names = list(compared.names)
    heat(figure, compared.cosines.tolist(), names, names, cmap="RdBu_r", vmin=-1, vmax=1)


def _basis(figure: Any, fleet: Found) -> None:
    compared = fleet.comparison
    assert compared is not None
    assert compared.shared is not None
    axes = figure.add_subplot()
    axes.plot(list(compared.shared), list(compared.shared.values()), color=INK, linewidth=2.2)
    axes.axvline(compared.rank, color=INK, linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(xlabel="rank of the common lora_A", ylabel="energy kept", ylim=(0, 1.02))
    axes.grid(True)
