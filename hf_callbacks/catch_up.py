"""`phlora catch-up`: adapters for the checkpoints of a run that is over."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peft_posthoc.cli.command import Command
from peft_posthoc.cli.options import CHOICE, NAMES, OUTPUT, option
from peft_posthoc.cli.output import check_file, show
from peft_posthoc.cli.ranks import RANK, Asked
from peft_posthoc.cli.refining import AND_REFINE, refining_if_asked
from peft_posthoc.errors import PosthocError, one_line
from peft_posthoc.ranks.words import WORDS

if TYPE_CHECKING:
    from hf_callbacks.memory import Memory


class _AsTheRun(Command):
    """A command whose options are by default those that the callback of the run had."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        run_dir = given.get("run_dir")
        memory = _remembered(Path(run_dir), needed="base" not in given) if isinstance(run_dir, str) else None
        if memory is not None and memory.request is not None:
            run = {**memory.request, **memory.request.get("rank", {})}
            if "rank_pattern" in run:
                run["rank_pattern"] = json.dumps(run["rank_pattern"])
            # A rank that is asked for now takes the place of all that was said of ranks.
            said = _OF_RANKS if _OF_RANKS & set(given) else {"rank"} - set(memory.request.get("rank", {}))
            ctx.default_map = {name: value for name, value in run.items() if name not in said}
        return super().parse_args(ctx, args)


_OF_RANKS = set(WORDS)


@click.command(
    "catch-up",
    cls=_AsTheRun,
    examples=["catch-up outputs --base Qwen/Qwen2.5-7B --rank 16", "catch-up outputs --refine --prompts prompts.jsonl"],
)
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base", help="The model that the run started from.  [default: what the callback wrote down]")
@option("base_revision")
@option("device")
@RANK
@option("rank_pattern")
@option("dtype")
@option("form")
@option("min_energy")
@CHOICE
@option("for_base")
@option("vocab")
@option("with_tokenizer")
@NAMES
@AND_REFINE
@OUTPUT
def main(
    run_dir: Path,
    base: str | None,
    base_revision: str | None,
    rank: Asked,
    quiet: bool,
    json_to: str | None,
    **options: Any,
) -> None:
    """Make the adapters that a training run lacks: of every checkpoint in RUN_DIR, and `final`, the last or best one's.

    They go to RUN_DIR/phlora. Options that are not given are those of the run's callback, where there was one.
    """
    check_file(json_to, "--json")
    from hf_callbacks.base import Base
    from hf_callbacks.missing import make_missing
    from hf_callbacks.run import Run
    from peft_posthoc.extraction.request import Request

    memory, refining = _remembered(run_dir, needed=base is None), refining_if_asked(options)
    try:
        request = Request.of(rank.one() or 32, **options)
    except (PosthocError, ValueError) as error:
        raise click.UsageError(one_line(error)) from error
    run = Run(run_dir, request)
    run.base = Base(base, base_revision, "it was given") if base else memory.base if memory else None
    if run.base is None:
        raise click.ClickException(f"It is not known which model `{run_dir}` started from. Give --base.")
    if run.claim() is not None:
        raise click.ClickException(f"A training run is at work in `{run_dir}`. It makes its adapters itself.")
    try:
        made = make_missing(run, best=memory.best if memory else None, refining=refining, progress=not quiet)
    finally:
        run.stop()
    for told in [*made.failures, *(() if quiet else made.warnings)]:  # `show` has the warnings of a quiet one
        click.echo(told, err=True)
    show(made, json_to, quiet=quiet)
    if made.failures:
        raise click.exceptions.Exit(1)


def _remembered(run_dir: Path, *, needed: bool) -> Memory | None:
    from hf_callbacks.memory import remembered

    try:
        return remembered(run_dir / "_phlora")
    except PosthocError as error:
        if not needed:
            return None
        raise click.ClickException(f"{one_line(error)}. Give --base.") from error


if __name__ == "__main__":  # as before it was a command of `phlora`
    from peft_posthoc.cli.main import main as phlora

    phlora(["catch-up", *sys.argv[1:]], prog_name="phlora")
