"""`phlora extract --to`: an adapter extracted, and written at once as what other programs read."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from peft_posthoc.cli.output import check_file, show
from peft_posthoc.errors import noting


def write_as(
    base: str,
    tuned: str,
    rule: Any,
    out: Path,
    to: Any,
    *,
    force: bool,
    dry_run: bool,
    quiet: bool,
    json_to: str | None,
    **options: Any,
) -> None:
    """Extract, and export what was extracted.

    Raises:
        UsageError: Several ranks are asked for.
    """
    from peft_posthoc.extraction.extract import extract as run
    from peft_posthoc.extraction.preflight import preflight
    from peft_posthoc.formats.export import check_out
    from peft_posthoc.formats.export import export as write
    from peft_posthoc.ranks.rules import several

    if isinstance(rule, several):
        raise click.UsageError("--to goes with one rank.")
    rank = rule or 32
    check_file(json_to, "--json")
    check_out(to, out, force=force)
    if dry_run:
        show(preflight(base, tuned, rank, **options), json_to, quiet=quiet)
        return
    adapter = run(base, tuned, rank, progress=not quiet, **options)
    with TemporaryDirectory(prefix="phlora-") as room:
        adapter.save(Path(room) / out.stem)
        done = write(Path(room) / out.stem, out, to, base=base, base_revision=options["base_revision"], force=force)
    with noting(f"The LoRA is at `{out}`."):
        told = f"{adapter.report.table()}\n\n{done.table()}"
        show(adapter.report, json_to, quiet=quiet, table=told, more=[f"Written to {out}"])
