"""`phlora refine`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peft_posthoc.cli.options import MODELS, OUTPUT
from peft_posthoc.cli.output import check_file, quiet_hosts, show
from peft_posthoc.errors import ShareDone, noting

if TYPE_CHECKING:
    from peft_posthoc.refinement.method import Method
    from peft_posthoc.texts.texts import Texts

_FILE = click.Path(path_type=Path, dir_okay=False)
_POSITIVE = click.FloatRange(0, min_open=True)
_METHODS = {"distil": ("lr", "passes"), "compensated": ("damping",), "blocks": ("lr", "passes")}
"""The ways to refine, with the options that are theirs."""


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The model before.")
@click.option("--tuned", required=True, help="The model after.")
@click.option(
    "--prompts",
    type=_FILE,
    metavar="FILE",
    help="Unlabelled prompts (txt, jsonl, json, parquet); the tuned model answers them.",
)
@click.option("--texts", type=_FILE, metavar="FILE", help="Texts of the task, used as they are.")
@click.option("--field", metavar="NAME", help="The field of FILE's records.  [default: prompt, messages, text, ...]")
@click.option(
    "--prefix",
    metavar="TEXT",
    help="Without a file: what a prompt of the task starts with.  [default: the chat template's]",
)
@click.option("--sequences", default=960, show_default=True, type=click.IntRange(4), help="Texts to fit on.")
@click.option(
    "--length",
    type=click.IntRange(2),
    help="Tokens of a text at most.  [default: 128; with longer prompts room for them and an answer, up to 1024]",
)
@click.option(
    "--method",
    default="distil",
    show_default=True,
    type=click.Choice(list(_METHODS)),
    help="The whole model by gradients; each layer in closed form; or each block by gradients. The last two have one "
    "block of each model in memory at a time.",
)
@click.option("--passes", type=_POSITIVE, help="distil, blocks: over the texts.  [default: 4; 2]")
@click.option("--lr", type=_POSITIVE, help="distil, blocks: step, relative to a factor's size.  [default: 0.05]")
@click.option(
    "--damping",
    type=_POSITIVE,
    help="compensated: how strongly layers are drawn to the tuned weights, where text says little.  [default: 0.03]",
)
@click.option("--minutes", type=_POSITIVE, help="How long all of it may take, loading and judging included.")
@click.option("--seed", default=0, show_default=True, help="Of all that is drawn.")
@click.option("--force", is_flag=True, help="Replace an adapter that is at OUT; what else lies there stays.")
@click.option("--dry-run", is_flag=True, help="Read headers only, show what it would do and need, and write nothing.")
@MODELS
@OUTPUT
def refine(
    adapter: Path,
    out: Path,
    prompts: Path | None,
    texts: Path | None,
    field: str | None,
    prefix: str | None,
    method: str,
    lr: float | None,
    passes: float | None,
    damping: float | None,
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
    chosen = _method(method, {"lr": lr, "passes": passes, "damping": damping})
    given = _texts(prompts, texts, field, prefix)
    quiet_hosts()
    if dry_run:
        from peft_posthoc.refinement.preflight import refine_preflight

        told = ("base", "tuned", "sequences", "length", "base_revision", "tuned_revision")
        found = refine_preflight(adapter, method=chosen, out=out, **{key: options[key] for key in told})
        show(found, json_to, quiet=quiet)
        return
    try:
        refined = run(
            adapter,
            texts=given,
            method=chosen,
            out=out,
            since=since,
            processes=processes,
            progress=not quiet and not processes.rank,
            **options,
        )
    except ShareDone:
        return
    if processes.rank:
        return
    refined.save(out, force=force)
    with noting(f"The adapter is at `{out}`."):
        show(refined, json_to, quiet=quiet, more=[f"Adapter written to {out}"])


def _method(name: str, options: Mapping[str, float | None]) -> Method:
    import peft_posthoc

    given = {key: value for key, value in options.items() if value is not None}
    for key in given.keys() - {*_METHODS[name]}:
        raise click.UsageError(f"--{key} does not belong to --method {name}.")
    chosen: Method = getattr(peft_posthoc, name)(**given)
    return chosen


def _texts(prompts: Path | None, texts: Path | None, field: str | None, prefix: str | None) -> Texts:
    from peft_posthoc.texts.prompts import read_prompts, read_texts
    from peft_posthoc.texts.texts import Given, Prompts, Sampled

    if sum(one is not None for one in (prompts, texts, prefix)) > 1:
        raise click.UsageError("Give one of --prompts, --texts and --prefix.")
    if field is not None and prompts is texts is None:
        raise click.UsageError("--field belongs to --prompts or --texts.")
    if prompts is not None:
        return Prompts(read_prompts(prompts, field))
    if texts is not None:
        return Given(read_texts(texts, field))
    return Sampled(prefix)
