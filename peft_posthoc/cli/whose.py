"""`phlora whose`."""

from __future__ import annotations

import click

from peft_posthoc.cli.command import Command
from peft_posthoc.cli.options import OUTPUT
from peft_posthoc.cli.output import check_file, show


@click.command(cls=Command, examples=["whose tuned Qwen/Qwen2.5-7B Qwen/Qwen2.5-7B-Instruct"])
@click.argument("tuned")
@click.argument("candidates", nargs=-1, metavar="[CANDIDATE...]")
@OUTPUT
def whose(tuned: str, candidates: tuple[str, ...], quiet: bool, json_to: str | None) -> None:
    """Tell which CANDIDATE is the base of TUNED, from a few kilobytes of each; where it is unsure it says so.

    Without one these are what TUNED's card and configuration name, what those name in turn, and the models of its kind
    in the hub's local cache.
    """
    check_file(json_to, "--json")
    from peft_posthoc.lineage.whose import whose as run

    show(run(tuned, candidates), json_to, quiet=quiet)
