"""Adapters for the checkpoints of a run that is over.

python -m hf_callbacks.catch_up RUN_DIR --base BASE
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from hf_callbacks.base import Base, remembered
from hf_callbacks.extraction import Extraction
from hf_callbacks.run import FINAL, Run
from peft_posthoc.options import CHOICE, FORM, NAMES, VOCAB
from peft_posthoc.rank_options import RANK, RANK_PATTERN, Asked


@click.command()
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base", help="The model that the run started from.  [default: what the callback wrote down]")
@click.option("--base-revision", metavar="REV", help="Branch, tag or commit, where BASE is a hub id.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda or auto.")
@RANK
@RANK_PATTERN
@FORM
@CHOICE
@VOCAB
@NAMES
def main(
    run_dir: Path,
    base: str | None,
    base_revision: str | None,
    rank: Asked,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    **options: Any,
) -> None:
    """Make the adapters that are missing: of every checkpoint in RUN_DIR, and `final`, the last one's."""
    run = Run(run_dir, Extraction(rank.one() or 32, include, exclude, **options))
    run.base = Base(base, base_revision, "it was given") if base else remembered(run.work)
    if run.base is None:
        raise click.ClickException(f"It is not known which model `{run_dir}` started from. Give --base.")
    missing = run.missing()
    if not missing and not run.adapters():
        raise click.ClickException(f"There are no checkpoints in `{run_dir}`.")
    failed = []
    for step, folder in tqdm(missing.items(), desc="Adapters"):
        failed += [done for done in run.make(folder, step) if done.failure]
    for job, failure in failed:
        click.echo(f"There is no adapter `{job.name}`: {failure}", err=True)
    if run.adapters() and not (run.out / FINAL).exists():
        run.copy(max(run.adapters()), name=FINAL)
    run.draw()
    click.echo(f"{len(run.adapters())} adapters are in {run.out}")
    if failed:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main(prog_name="python -m hf_callbacks.catch_up")
