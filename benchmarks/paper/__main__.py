"""`python -m benchmarks.paper run CONFIG --data FOLDER --work FOLDER`, and `python -m benchmarks.paper page`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .results import LAYERS, SPECTRUM
from .settings import TASKS, Settings
from .task import fetched

if TYPE_CHECKING:
    from .experiment import Experiment

HERE = Path(__file__).parent


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """The paper's tables on models and data within reach."""


@main.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="The task's local folder. Default: its home on the hub.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="For models and adapters; kept.")
@click.option("--seed", "only", type=int, help="This one of its seeds alone.")
@click.option("--row", "chosen", multiple=True, help="Those alone. Default: all that are not there yet.")
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
def run(config: Path, data: Path | None, work: Path, only: int | None, chosen: tuple[str, ...], results: Path) -> None:
    """Make the rows of CONFIG that are not there yet: a file each in RESULTS. Interrupted, the same command goes on."""
    from .experiment import Experiment, rows

    settings = Settings.read(config)
    work, results = work / config.stem, results / config.stem
    try:
        if unknown := set(chosen) - rows(settings).keys():
            raise click.BadParameter(f"{sorted(unknown)}: there are {list(rows(settings))}.")
        data = data or fetched(TASKS[settings.task].home)
        if settings.seeds is None:
            _rows(Experiment(settings, data, work), chosen, results)
        for seed in settings.seeds or ():
            if only in (None, seed):
                name = f"seed-{seed}"
                made = Experiment(replace(settings, seed=seed, seeds=None), data, work / name, shared=work)
                _rows(made, chosen, results / name)
    except (FileNotFoundError, NotImplementedError) as error:
        raise click.ClickException(str(error)) from error


def _rows(made: Experiment, chosen: tuple[str, ...], results: Path) -> None:
    from .experiment import measured, rows, where
    from .layers import by_layer

    made.work.mkdir(parents=True, exist_ok=True)
    for place, (name, row) in enumerate(rows(made.settings).items()):
        file = results / f"{place:02}-{name.replace(' ', '-')}.json"
        if file.is_file() or (chosen and name not in chosen):
            continue
        found = measured(made, name, row)
        _write(made.work / "said" / file.name, found.pop("said"))  # quotes the data set, which is not ours to ship
        _write(file, found)
        means = {metric: sum(one.values()) / len(one) for metric, one in found["metrics"].items()}
        click.echo(f"{name}: {means}")
    largest = made.work / f"svd-{max(made.settings.ranks)}"
    if not (results / SPECTRUM).is_file() and largest.is_dir():
        _write(results / SPECTRUM, made.spectrum() | where())
    rank = made.settings.layer_rank
    if rank is not None and not chosen and not (results / LAYERS).is_file():
        _write(results / LAYERS, by_layer(made, rank) | where())


def _write(file: Path, told: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@main.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("adapters", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="The task's local folder.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where `run` left its models.")
@click.option(
    "--every", type=click.IntRange(1), default=3, show_default=True, help="Of the test's questions; 1 is all."
)
def nearness(config: Path, adapters: tuple[Path, ...], data: Path, work: Path, every: int) -> None:
    """Print how near ADAPTERS are to the tuned model on the test's answers, and to what is right."""
    from .experiment import Experiment
    from .nearness import nearness as made

    for line in made(Experiment(Settings.read(config), data, work / config.stem), adapters, every):
        click.echo(line)


@main.command()
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE.parent / "PAPER.md", show_default=True)
def page(results: Path, out: Path) -> None:
    """Write the page of all rows that are there, and its picture beside it."""
    from .beside import FIGURE
    from .figure import draw
    from .page import page as made
    from .results import read

    out.write_text(made(results), encoding="utf-8")
    draw(list(read(results)), out.with_name(FIGURE))


@main.command()
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
def headline(results: Path) -> None:
    """Print the README's table."""
    from .headline import headline as made

    click.echo(made(results))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.paper")
