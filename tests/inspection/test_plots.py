"""What the pictures of an inspection show."""

import datetime

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from peft_posthoc.inspection.drawing import SIZE
from peft_posthoc.inspection.heats import changed, kept
from peft_posthoc.inspection.inspection import inspect
from peft_posthoc.inspection.plots import heading, plots
from peft_posthoc.inspection.sizes import against_size
from tests.make.diagonal import diagonal, pair_with


def drawn(draw, inspection):
    figure = Figure()
    draw(figure, inspection)
    return figure.axes[0]


def of(**deltas):
    return inspect(*pair_with({name.replace("__", ".") + ".weight": delta for name, delta in deltas.items()}))


@pytest.mark.parametrize("values", [(4.0, 3.0), (1.0,) * 8])
def test_colours_mean_the_same_in_every_report(values):
    inspection = of(layers__0__a=diagonal(*values), layers__1__a=diagonal(1.0))
    assert drawn(kept, inspection).collections[0].get_clim() == (0, 1)
    assert drawn(changed, inspection).collections[0].get_clim() == (1e-4, 1)


def test_the_whole_change_is_shown_with_what_is_not_carried():
    # Of 100 parts of energy the head has 74, the norm 1, layer 0 has 20 and layer 1 has 5.
    layers = {"layers__0__a": diagonal(20.0**0.5), "layers__1__a": diagonal(5.0**0.5)}
    norm = torch.tensor([1.0, *[0.0] * 7])
    axes = drawn(changed, of(lm_head=diagonal(74.0**0.5), norm=norm, **layers))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lm_head", "a", "norm"]
    assert [text.get_text() for text in axes.texts] == ["74.0%, not carried", "25.0%", "1.0%, not carried"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "other"]
    rows = axes.collections[0].get_array().reshape(3, 3)
    assert rows[1, :2].tolist() == pytest.approx([0.2, 0.05])
    assert rows[:, 2].filled(0).tolist() == pytest.approx([0.74, 0, 0.01])


def test_many_modules_are_a_row_together():
    axes = drawn(changed, of(**{f"a{n}": diagonal(1.0) for n in range(25)}))
    assert axes.get_yticklabels()[-1].get_text() == "5 others"
    assert axes.texts[-1].get_text() == "20.0%"


def test_a_legend_names_the_modules_that_hold_most_within_its_drawing():
    figure = Figure(figsize=SIZE, layout="constrained")
    long = "transformer_blocks_and_more_x"
    inspection = of(**{f"{long}{n}": diagonal(float(n + 1)) for n in range(25)})
    next(iter(plots(inspection).values()))[0](figure, inspection)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    names = [text.get_text().strip("\N{ZERO WIDTH SPACE}") for text in legend.get_texts()]
    assert (names[0], names[-1]) == ("total", "13 others")
    assert [name.rpartition("x")[2] for name in names[1:-1]] == [str(n) for n in range(13, 25)]
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_energy_stands_against_bytes_and_what_is_larger_than_the_model_is_shaded():
    inspection = of(a=diagonal(3.0, 1.0, side=64), b=diagonal(1.0, side=64))
    axes = drawn(against_size, inspection)
    (ranks,) = [line for line in axes.lines if line.get_label() == "--rank"]
    sizes = [2 * 2 * 64 * rank * 4 for rank in (8, 16, 32, 64)]
    assert list(ranks.get_xdata()) == sizes
    assert list(ranks.get_ydata()) == pytest.approx([1.0] * 4)
    (shade,) = axes.patches
    assert shade.get_x() == inspection.tuned_bytes == 2 * 64 * 64 * 4


def test_a_picture_names_the_pair_and_the_day():
    inspection = of(a=diagonal(1.0))
    made = inspection.report.provenance
    assert heading(inspection) == f"{made['base']} → {made['tuned']}, {datetime.date.today().isoformat()}"
