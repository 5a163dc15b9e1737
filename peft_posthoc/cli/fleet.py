"""`phlora extract` of many fine-tunes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from peft_posthoc.cli.output import check_drawing, check_file, show
from peft_posthoc.errors import ShareDone, noting


def of_many(
    base: str,
    tuned: Sequence[str],
    rule: Any,
    *,
    out: Path,
    force: bool,
    dry_run: bool,
    html: Path | None,
    quiet: bool,
    json_to: str | None,
    **options: Any,
) -> None:
    """Write the adapter of each fine-tune into a folder of its own; exit with status 1 where one failed."""
    from peft_posthoc.extraction.processes import Processes
    from peft_posthoc.fleet.extract_many import extract_many, preflight_many
    from peft_posthoc.fleet.named import listed

    check_file(json_to, "--json")
    check_drawing(html, "--html")
    sources = listed(tuned, base)
    if dry_run:
        planned = preflight_many(base, sources, rule or 32, out=out, **options)
        show(planned, json_to, quiet=quiet)
        failed = [(one.name, one.error) for one in planned.failed]
    else:
        processes = Processes.from_environment()
        try:
            fleet = extract_many(
                base, sources, rule or 32, out=out, force=force, processes=processes, progress=not quiet, **options
            )
        except ShareDone:
            return
        failed = [(one.name, one.error) for one in fleet.failed]
        with noting(f"The adapters are in `{out}`."):
            if html is not None:
                fleet.html(html)
            show(fleet, json_to, quiet=quiet, more=[f"Adapters written to {out}"] if len(failed) < len(sources) else [])
    if failed:
        if quiet or json_to == "-":
            for name, error in failed:
                click.echo(f"phlora: {name}: {error}", err=True)
        raise click.exceptions.Exit(1)
