"""`phlora verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peft_posthoc.cli.command import Command
from peft_posthoc.cli.options import LAYERS, MODELS, NAMES, OUTPUT
from peft_posthoc.cli.output import check_file, quiet_hosts, show
from peft_posthoc.cli.refining import TEXTS, texts_of
from peft_posthoc.errors import PosthocError

if TYPE_CHECKING:
    from peft_posthoc.verification.findings import Verification


@click.command(
    cls=Command,
    examples=[
        "verify adapter --base base --tuned tuned",
        "verify adapter --base base --tuned tuned --weights-only",
    ],
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The model before.")
@click.option("--tuned", required=True, help="The model after.")
@TEXTS
@click.option("--sequences", default=64, show_default=True, type=click.IntRange(4), help="How many texts of a file.")
@click.option("--length", type=click.IntRange(2), help="Tokens of each at most.  [default: as for `phlora refine`]")
@click.option("--prompt", multiple=True, metavar="TEXT", help="Compare the models' outputs on this text.")
@click.option("--token-ids", multiple=True, metavar="'1 2 3'", help="The same, already tokenized.")
@click.option("--weights-only", is_flag=True, help="Do not load the models to compare outputs.")
@click.option("--min-cosine", type=float, help="Fail if the adapter's cosine with the whole delta is below this.")
@click.option("--max-kl", type=float, help="Fail if KL(tuned || base + adapter) per token, in nats, is above this.")
@NAMES
@MODELS
@LAYERS
@OUTPUT
def verify(
    out: Path,
    base: str,
    tuned: str,
    prompt: tuple[str, ...],
    prompts: Path | None,
    texts: Path | None,
    field: str | None,
    token_ids: tuple[str, ...],
    weights_only: bool,
    layers: bool,
    min_cosine: float | None,
    max_kl: float | None,
    quiet: bool,
    json_to: str | None,
    **options: Any,
) -> None:
    """Compare BASE plus the adapter in OUT with TUNED: weights, then outputs.

    Fails if base + adapter is no nearer to TUNED than BASE is. With a file it is compared on text: prompts, answered by
    TUNED, or texts as they are; and on general text that BASE writes.
    """
    check_file(json_to, "--json")
    from peft_posthoc.verification.verify import verify as run

    ids = [_token_ids(text) for text in token_ids]
    given = texts_of(prompts, texts, field) if prompts or texts or field else None
    if given is not None and (prompt or ids):
        raise click.UsageError("A file of texts is compared on alone, without --prompt and --token-ids.")
    if given is not None and weights_only:
        raise click.UsageError("--weights-only reads no text: leave out --prompts, --texts and --field.")
    if not weights_only:
        quiet_hosts()

    def show_weights(found: Verification) -> None:
        if json_to != "-":
            show(found, json_to, quiet=quiet, table=found.weights(layers=layers))

    options |= {"outputs": not weights_only, "progress": not quiet, "weights_done": show_weights}
    result = run(out, base, tuned, prompts=prompt, texts=given, token_ids=ids, **options)
    show(result, json_to, quiet=quiet, table=result.rest())
    if result.failure:
        raise PosthocError(
            f"The weights were compared, the outputs were not: {result.failure.rstrip('.')}. "
            "With `--weights-only` that is enough."
        )
    if min_cosine is not None and not result.cosine >= min_cosine:  # What is no number passes neither way.
        raise PosthocError(f"The cosine with the whole delta is {result.cosine:.4f}, below --min-cosine {min_cosine}.")
    if max_kl is not None:
        if result.adapter is None or result.adapter.kl is None:
            raise PosthocError(f"--max-kl cannot be checked: no logits were compared ({result.outputs_note}).")
        if not result.adapter.kl <= max_kl:
            raise PosthocError(f"KL(tuned || base + adapter) is {result.adapter.kl:.5f} nats, above --max-kl {max_kl}.")
    if not result.nearer:
        raise PosthocError(result.verdict())


def _token_ids(text: str) -> list[int]:
    try:
        return [int(token) for token in text.replace(",", " ").split()]
    except ValueError as error:
        raise click.BadParameter(f"`{text}` is not a list of numbers.", param_hint="--token-ids") from error
