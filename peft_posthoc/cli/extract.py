"""`phlora extract`."""

from __future__ import annotations

import contextlib
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from peft_posthoc.cli.command import Command
from peft_posthoc.cli.components import COMPONENT, Component, check_alone, components_of
from peft_posthoc.cli.export import IMAGES
from peft_posthoc.cli.fleet import of_many
from peft_posthoc.cli.options import CHOICE, HTML, LAYERS, MODELS, NAMES, OUTPUT, option
from peft_posthoc.cli.output import check_drawing, check_file, quiet_hosts, show
from peft_posthoc.cli.ranks import RANK, Asked
from peft_posthoc.cli.refining import AND_REFINE, SHARD, refining_if_asked
from peft_posthoc.cli.write_as import write_as
from peft_posthoc.errors import ShareDone, noting

_AS_EXTRACTED = "Nothing was written. The same command without `--refine` writes the adapter as it was extracted."


@click.command(
    cls=Command,
    examples=[
        "extract Qwen/Qwen2.5-7B me/its-fine-tune adapter --rank 16",
        "extract base tuned adapter --energy 90% --head --embeddings",
        "extract base tuned adapter --budget 64mb --dry-run",
        "extract base tuned-a tuned-b --out adapters",
    ],
)
@click.argument("base")
@click.argument("tuned", nargs=-1, required=True, metavar="TUNED OUT | TUNED... --out DIR")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The adapters' folders go in here.")
@RANK
@option("rank_pattern")
@option("conv_rank", type=int)
@COMPONENT
@option("dtype")
@option("tuned_name")
@option("min_energy")
@click.option("--force", is_flag=True, help="Replace an adapter that is at OUT; what else lies there stays.")
@click.option("--dry-run", is_flag=True, help="Read headers only, show what would be done, and write nothing.")
@LAYERS
@AND_REFINE
@SHARD
@HTML
@click.option(
    "--to",
    type=click.Choice(IMAGES),
    help="Write OUT, NAME.safetensors, as `phlora export` does; comfyui: with --form peft, unless another is given.",
)
@option("form")
@CHOICE
@option("for_base")
@option("vocab")
@option("with_tokenizer")
@NAMES
@MODELS
@option("stream")
@option("unrelated")
@OUTPUT
def extract(
    base: str,
    tuned: tuple[str, ...],
    out: Path | None,
    rank: Asked,
    components: tuple[str, ...],
    force: bool,
    dry_run: bool,
    layers: bool,
    html: Path | None,
    to: str | None,
    quiet: bool,
    json_to: str | None,
    **options: Any,
) -> None:
    """Write the LoRA adapter that leads from BASE to TUNED into the folder OUT.

    With several ranks between commas, as in --rank 8,16,32, the adapters are OUT/r8, OUT/r16, OUT/r32, of one
    factorization. With --refine OUT is the refined adapter, or nothing: where the fit fails, the same command without
    --refine writes the adapter as it was extracted, from finished layers that are kept beside OUT.

    With --out there may be many TUNED, and text files that list them (@FILE, or FILE.txt) and collections on the hub
    (collections/OWNER/TITLE-ID): the base is read once for all, each has a folder of its own in DIR, and what fails
    stops no other.
    """
    rule, asked = rank.rule(), refining_if_asked(options)
    check_alone(components, out=out, html=html, json=json_to, refine=asked)
    if out is not None:
        if to is not None:
            raise click.UsageError("--to goes with one TUNED. `phlora export` writes each adapter afterwards.")
        if asked is not None:
            raise click.UsageError("--refine goes with one TUNED. `phlora refine` refines each adapter afterwards.")
        of_many(
            base, tuned, rule, out=out, force=force, dry_run=dry_run, html=html, quiet=quiet, json_to=json_to, **options
        )
        return
    if len(tuned) < 2:
        raise click.UsageError("Missing argument 'OUT'.")
    if len(tuned) > 2:
        raise click.UsageError("Give BASE TUNED OUT; or, for many fine-tunes, BASE TUNED... --out DIR.")
    whole = Component(base, tuned[0], Path(tuned[1]), None)
    parts = components_of(components, *whole[:3])
    if to is not None:
        if asked is not None or html is not None:
            raise click.UsageError("--to goes without --refine and --html.")
        if to == "comfyui" and click.get_current_context().get_parameter_source("form") is ParameterSource.DEFAULT:
            options["form"] = "peft"
        write_as(
            parts or [whole],
            rule,
            whole.out,
            to,
            force=force,
            dry_run=dry_run,
            quiet=quiet,
            json_to=json_to,
            **options,
        )
        return
    for part in parts or [whole]:
        with noting(f"This is of the component `{part.out.name}`.") if parts else contextlib.nullcontext():
            _one(
                part.base,
                part.tuned,
                part.out,
                part.rank or rule,
                asked,
                force=force,
                dry_run=dry_run,
                layers=layers,
                html=html,
                quiet=quiet,
                json_to=json_to,
                **options,
            )


def _one(
    base: str,
    tuned: str,
    out: Path,
    rule: Any,
    asked: Any,
    *,
    force: bool,
    dry_run: bool,
    layers: bool,
    html: Path | None,
    quiet: bool,
    json_to: str | None,
    **options: Any,
) -> None:
    since = time.monotonic()
    from peft_posthoc.adapters.writer import check_target
    from peft_posthoc.extraction.extract import extract as run
    from peft_posthoc.extraction.preflight import preflight
    from peft_posthoc.extraction.processes import Processes
    from peft_posthoc.extraction.series import Series, check_targets
    from peft_posthoc.extraction.spool import finished_layers
    from peft_posthoc.ranks.rules import several

    # Bad arguments are told before the work, not after it.
    if asked is not None and (isinstance(rule, several) or html is not None):
        raise click.UsageError("--refine goes with one rank and without --html.")
    if asked is not None and options["stream"]:
        raise click.UsageError("--refine loads both models from the disk: it goes without --stream.")
    check_file(json_to, "--json")
    check_drawing(html, "--html")
    if isinstance(rule, several):
        check_targets(out, dict(rule.named), force=force)
    else:
        check_target(out, force=force)
    processes = Processes.from_environment()
    if dry_run:
        if processes.rank:
            return
        see = preflight if asked is None else partial(asked.preflights, processes=processes.size)
        show(see(base, tuned, rule or 32, out=out, **options), json_to, quiet=quiet)
        return
    if asked is not None:
        revisions = {name: options[name] for name in ("base_revision", "tuned_revision")}
        asked.check(base, tuned, processes=processes.size, **revisions)
        quiet_hosts()
    try:
        adapter = run(
            base,
            tuned,
            rule or 32,
            out=out,
            processes=processes,
            everywhere=asked is not None,
            progress=not quiet,
            **options,
        )
        if asked is not None:
            with noting(_AS_EXTRACTED):
                refined = asked(
                    adapter,
                    base,
                    tuned,
                    **revisions,
                    device=options["device"],
                    out=out,
                    since=since,
                    processes=processes,
                    progress=not quiet and not processes.rank,
                )
    except ShareDone:
        return
    if processes.rank:
        return
    if asked is not None:
        with finished_layers(out.absolute(), {out.absolute(): adapter.provenance}):
            refined.save(out, force=force)
        with noting(f"The adapter is at `{out}`."):
            table = f"{adapter.report.table(layers=layers)}\n\n{refined.table()}"
            show(refined, json_to, quiet=quiet, table=table, more=[f"Adapter written to {out}"])
        return
    found = Series.of(adapter, rule) if isinstance(rule, several) else adapter
    found.save(out, force=force)
    several_of_them = isinstance(found, Series)
    with noting(f"The {'adapters are' if several_of_them else 'adapter is'} at `{out}`."):
        if html is not None:
            from peft_posthoc.inspection.inspection import Inspection

            made = found.adapters if isinstance(found, Series) else {"as written": adapter}
            Inspection.of(adapter, made).html(html)
        done = f"{'Adapters' if several_of_them else 'Adapter'} written to {out}"
        if isinstance(found, Series):
            show(found, json_to, quiet=quiet, more=["", done])
            return
        table = found.report.table(layers=layers)
        compare = shlex.join(["phlora", "verify", str(out), "--base", base, "--tuned", tuned])
        show(found.report, json_to, quiet=quiet, table=table, more=["", done, f"To compare it with TUNED: {compare}"])
