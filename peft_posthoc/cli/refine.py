"""`phlora refine`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from peft_posthoc.cli.command import Command
from peft_posthoc.cli.options import MODELS, OUTPUT
from peft_posthoc.cli.output import check_file, quiet_hosts, show
from peft_posthoc.cli.refining import REFINING, SHARD, refining
from peft_posthoc.errors import ShareDone, noting


@click.command(
    cls=Command,
    examples=[
        "refine adapter refined --base base --tuned tuned",
        "refine adapter refined --base base --tuned tuned --prompts prompts.jsonl --minutes 10",
    ],
)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The model before.")
@click.option("--tuned", required=True, help="The model after.")
@REFINING
@SHARD
@click.option("--force", is_flag=True, help="Replace an adapter that is at OUT; what else lies there stays.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Read headers and the tokenizer only, show what it would do and need, and write nothing.",
)
@MODELS
@OUTPUT
def refine(
    adapter: Path,
    out: Path,
    force: bool,
    dry_run: bool,
    quiet: bool,
    json_to: str | None,
    **options: Any,
) -> None:
    """Fit the factors of ADAPTER to what TUNED computes, and write the adapter into the folder OUT.

    ADAPTER is a LoRA folder of BASE. Its modules, ranks and scale stay. No labels are needed, and no data: without a
    file the two models write the text. Held-out text judges: on none is OUT further from TUNED than ADAPTER.
    """
    since = time.monotonic()
    from peft_posthoc.adapters.writer import check_target
    from peft_posthoc.extraction.processes import Processes
    from peft_posthoc.refinement.refine import refine as run

    processes = Processes.from_environment()
    if not processes.rank:
        check_file(json_to, "--json")
        check_target(out, force=force)
    asked = refining(options)
    quiet_hosts()
    if dry_run:
        if processes.rank:
            return
        show(asked.preflight(adapter, out=out, processes=processes.size, **options), json_to, quiet=quiet)
        return
    try:
        refined = run(
            adapter,
            out=out,
            since=since,
            processes=processes,
            progress=not quiet and not processes.rank,
            **vars(asked),
            **options,
        )
    except ShareDone:
        return
    if processes.rank:
        return
    refined.save(out, force=force)
    with noting(f"The adapter is at `{out}`."):
        show(refined, json_to, quiet=quiet, more=[f"Adapter written to {out}"])
