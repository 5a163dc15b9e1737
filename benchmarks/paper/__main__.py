"""`python -m benchmarks.paper run CONFIG --data FOLDER --work FOLDER`, and `python -m benchmarks.paper page`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .settings import Settings

HERE = Path(__file__).parent


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """The paper's tables on models and data within reach."""


@main.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="The task's local folder.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="For models and adapters; kept.")
@click.option("--row", "chosen", multiple=True, help="Those alone. Default: all that are not there yet.")
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
def run(config: Path, data: Path, work: Path, chosen: tuple[str, ...], results: Path) -> None:
    """Make the rows of CONFIG that are not there yet: a file each in RESULTS. Interrupted, the same command goes on."""
    from .experiment import Experiment, measured, rows

    settings = Settings.read(config)
    made, all_rows = Experiment(settings, data, work / config.stem), rows(settings)
    if unknown := set(chosen) - all_rows.keys():
        raise click.BadParameter(f"{sorted(unknown)}: there are {list(all_rows)}.")
    made.work.mkdir(parents=True, exist_ok=True)
    try:
        for place, (name, row) in enumerate(all_rows.items()):
            file = results / config.stem / f"{place:02}-{name.replace(' ', '-')}.json"
            if file.is_file() or (chosen and name not in chosen):
                continue
            found = measured(made, name, row)
            _write(made.work / "said" / file.name, found.pop("said"))  # quotes the data set, which is not ours to ship
            _write(file, found)
            means = {metric: sum(one.values()) / len(one) for metric, one in found["metrics"].items()}
            click.echo(f"{name}: {means}")
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from error


def _write(file: Path, told: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@main.command()
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE.parent / "PAPER.md", show_default=True)
def page(results: Path, out: Path) -> None:
    """Write the page of all rows that are there."""
    from .page import page as made

    out.write_text(made(results), encoding="utf-8")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.paper")
