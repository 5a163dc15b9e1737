"""`phlora extract --to`: an adapter extracted, and written at once as what other programs read."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from peft_posthoc.cli.components import Component
from peft_posthoc.cli.output import check_file, show
from peft_posthoc.errors import noting

if TYPE_CHECKING:
    from torch import Tensor

    from peft_posthoc.extraction.adapter import Adapter


def write_as(
    parts: Sequence[Component],
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
    """Extract, and export what was extracted: of several components into one file.

    Raises:
        UsageError: Several ranks are asked for.
    """
    from peft_posthoc.extraction.extract import extract as run
    from peft_posthoc.extraction.preflight import preflight
    from peft_posthoc.formats.export import check_out, write
    from peft_posthoc.formats.open import open_deltas
    from peft_posthoc.ranks.rules import several

    if isinstance(rule, several):
        raise click.UsageError("--to goes with one rank.")
    check_file(json_to, "--json")
    target = check_out(to, out, force=force)
    tables, opened = [], []
    with TemporaryDirectory(prefix="phlora-") as room:
        for part in parts:
            called, rank = part.out.name if len(parts) > 1 else out.stem, part.rank or rule or 32
            with noting(f"This is of the component `{called}`.") if len(parts) > 1 else contextlib.nullcontext():
                if dry_run:
                    show(preflight(part.base, part.tuned, rank, **options), json_to, quiet=quiet)
                    continue
                adapter = run(part.base, part.tuned, rank, progress=not quiet, **options)
                adapter.save(Path(room) / called)
                base, revision = _served(part.base, options), options["base_revision"]
                opened.append(open_deltas(Path(room) / called, base, values=target.values, revision=revision))
                if to == "comfyui":
                    opened[-1].beside = _differences(adapter, part, rank, options)
                    adapter = replace(adapter, held=frozenset(opened[-1].beside))
                tables.append(f"{called}\n{adapter.report.table()}" if len(parts) > 1 else adapter.report.table())
        if dry_run:
            return
        done = write(opened, out, to, force=force)
    with noting(f"The LoRA is at `{out}`."):
        told = "\n\n".join([*tables, done.table()])
        show(adapter.report, json_to, quiet=quiet, table=told, more=[f"Written to {out}"])


def _served(base: str, options: Mapping[str, Any]) -> str:
    """The model whose names the adapter has."""
    served = options["serve_as"]
    return served if served is not None and Path(served).is_dir() else base


def _differences(adapter: Adapter, part: Component, rank: Any, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """What PEFT has no place for: parameters of the model itself, and of modules whose layers have factors."""
    from peft_posthoc.extraction.prepare import prepare
    from peft_posthoc.extraction.reasons import Reason
    from peft_posthoc.extraction.request import Request

    without = (Reason.OF_THE_MODEL, Reason.BESIDE_FACTORS, Reason.MISREAD, Reason.NOT_LOADED)
    names = [row.weight for row in adapter.report.rows if row.cause in without]
    if not names:
        return {}
    pair = prepare(part.base, part.tuned, Request.of(rank, **options))
    return {name: pair.tuned.read(name).double() - pair.base.read(name).double() for name in names}
