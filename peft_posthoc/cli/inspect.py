"""`phlora inspect`."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any

import click

from peft_posthoc.cli.command import Command
from peft_posthoc.cli.options import CHOICE, HTML, LAYERS, MODELS, NAMES, OUTPUT, option
from peft_posthoc.cli.output import check_drawing, check_file, show
from peft_posthoc.errors import noting


@click.command(
    cls=Command,
    examples=[
        "inspect base tuned --plot energy.png",
        "inspect base tuned --html page.html --head",
    ],
)
@click.argument("base")
@click.argument("tuned")
@click.option(
    "--max-rank", type=click.IntRange(min=1), default=512, show_default=True, help="The rank at which the curves end."
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw the curves and the ranks into this PNG (or SVG, PDF).",
)
@LAYERS
@HTML
@option("form")
@CHOICE
@option("vocab")
@NAMES
@MODELS
@option("stream")
@option("unrelated")
@OUTPUT
def inspect(
    base: str,
    tuned: str,
    max_rank: int,
    layers: bool,
    plot: Path | None,
    html: Path | None,
    quiet: bool,
    json_to: str | None,
    **options: Any,
) -> None:
    """Show how much of each delta every rank and rank rule would keep, and in how many bytes; write no adapter."""
    check_file(json_to, "--json")
    check_drawing(plot, "--plot")
    check_drawing(html, "--html")
    from peft_posthoc.inspection.inspection import inspect as run

    inspection = run(base, tuned, max_rank, progress=not quiet, **options)
    with contextlib.ExitStack() as written:
        if plot is not None:
            inspection.plot(plot)
            written.enter_context(noting(f"`{plot}` is written."))
        if html is not None:
            inspection.html(html)
            written.enter_context(noting(f"`{html}` is written."))
        files = [f"Written: {file}" for file in (plot, html) if file is not None]
        extract = shlex.join(["phlora", "extract", base, tuned, "adapter"])
        more = ["", *files, f"To make an adapter: {extract} --rank R, or another rule of the table"]
        show(inspection, json_to, quiet=quiet, table=inspection.table(layers=layers), more=more)
