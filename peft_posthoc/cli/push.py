"""`phlora push`."""

from __future__ import annotations

from pathlib import Path

import click

from peft_posthoc.cli.command import Command
from peft_posthoc.errors import PosthocError, noting


@click.command(cls=Command, examples=["push adapter me/my-adapter --private"])
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made now.")
@click.option("--force", is_flag=True, help="Replace a model card that somebody wrote.")
@click.option("--quiet", is_flag=True, help="Print errors and warnings only.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback when something goes wrong.")
def push(adapter: Path, repo: str, private: bool, force: bool, quiet: bool) -> None:
    """Upload the LoRA adapter in the folder ADAPTER to REPO on the hub, with a model card.

    The card says what the adapter holds, what is left out, how to load and serve it. One that somebody wrote stays.
    """
    from peft_posthoc.adapters.push import push as run
    from peft_posthoc.serving.check import check

    address = run(adapter, repo, private=private, force=force)
    with noting(f"The adapter is at {address}."):
        if not quiet:
            click.echo(f"Adapter pushed to {address}")
        try:
            found = check(adapter, engines=("all",))
        except PosthocError:
            return
        if found.wrong:
            told = (
                f"Warning: it would be refused or silently wrong in {', '.join(found.wrong)}: `phlora check {adapter}`."
            )
            click.echo(told, err=True)
