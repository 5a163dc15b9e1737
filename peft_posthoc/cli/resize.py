"""`phlora resize` and `phlora combine`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peft_posthoc.cli.command import Command
from peft_posthoc.cli.options import LAYERS, OUTPUT, TYPE, dtype_of, together
from peft_posthoc.cli.output import check_file, show
from peft_posthoc.cli.ranks import RANK, Asked, ranks
from peft_posthoc.errors import noting

if TYPE_CHECKING:
    from peft_posthoc.resizing.resized import Resized

_SHARED = together(
    click.option(
        "--dtype",
        type=TYPE,
        help="Type of the new adapter.  [default: that of the old ones]",
    ),
    click.option(
        "--form",
        type=click.Choice(("portable", "peft")),
        help="portable: one rank, what every engine loads. peft: every module at its own rank; biases and whole "
        "tensors too.  [default: portable, unless there are such]",
    ),
    click.option("--force", is_flag=True, help="Replace an adapter that is at OUT; what else lies there stays."),
    LAYERS,
    OUTPUT,
)


@click.command(cls=Command, examples=["resize adapter smaller --rank 8", "resize adapter smaller --energy 90%"])
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@RANK
@_SHARED
def resize(adapter: Path, out: Path, rank: Asked, **options: Any) -> None:
    """Write the best approximation of ADAPTER at a lower rank into the folder OUT.

    ADAPTER is a PEFT LoRA folder. The base model is not needed.
    """
    from peft_posthoc.resizing.resize import resize as run

    rule = rank.one() or 32
    _write(out, lambda **given: run(adapter, rule, **given), **options)


@click.command(
    cls=Command,
    examples=["combine adapter-a adapter-b both --weights 0.7,0.3", "combine adapter-a adapter-b both --rank 16"],
)
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--weights", metavar="W,W,...", help="What each adapter's delta is multiplied by.  [default: 1 each]")
@ranks("all: the sum is exact")
@_SHARED
def combine(adapters: tuple[Path, ...], out: Path, weights: str | None, rank: Asked, **options: Any) -> None:
    """Write the weighted sum of ADAPTERS, of one base, as one adapter into the folder OUT."""
    from peft_posthoc.resizing.resize import combine as run

    if len(adapters) < 2:
        raise click.UsageError("Give at least two adapters, and the folder to write: A B OUT.")
    rule, shares = rank.one(), None if weights is None else _numbers(weights)
    _write(out, lambda **given: run(adapters, shares, rule, **given), **options)


def _write(
    out: Path,
    run: Callable[..., Resized],
    *,
    form: str | None,
    dtype: str | None,
    force: bool,
    layers: bool,
    quiet: bool,
    json_to: str | None,
) -> None:
    from peft_posthoc.adapters.writer import check_target

    # Bad arguments are named before the work, not after it.
    check_file(json_to, "--json")
    check_target(out, force=force)
    resized = run(form=form, dtype=dtype_of(dtype), progress=not quiet)
    resized.save(out, force=force)
    with noting(f"The adapter is at `{out}`."):
        table = resized.report.table(layers=layers)
        show(resized.report, json_to, quiet=quiet, table=table, more=["", f"Adapter written to {out}"])


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"`{text}` is not a list of numbers.", param_hint="--weights") from error
