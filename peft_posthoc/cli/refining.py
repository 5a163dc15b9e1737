"""What is said of a refinement on the command line: by `phlora refine`, and by what refines what it has extracted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peft_posthoc.cli.options import together

if TYPE_CHECKING:
    from peft_posthoc.refinement.method import Method
    from peft_posthoc.refinement.refining import Refining
    from peft_posthoc.refinement.usual import Usual
    from peft_posthoc.texts.texts import Texts

_POSITIVE = click.FloatRange(0, min_open=True)
_METHODS = {
    "distil": ("lr", "passes", "bf16", "shard"),
    "compensated": ("damping",),
    "blocks": ("lr", "passes", "bf16"),
}
"""The ways to refine, with the options that are theirs."""


TEXTS = together(
    click.option(
        "--prompts",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Unlabelled prompts (txt, jsonl, json, parquet, or a data set on the hub: org/name); the tuned model "
        "answers them.",
    ),
    click.option(
        "--texts", type=click.Path(path_type=Path), metavar="FILE", help="Texts of the task, used as they are."
    ),
    click.option(
        "--field", metavar="NAME", help="The field of FILE's records.  [default: prompt, messages, text, ...]"
    ),
)
"""Files of text."""
REFINING = together(
    TEXTS,
    click.option(
        "--prefix",
        metavar="TEXT",
        help="Without a file: what a prompt of the task starts with.  [default: the chat template's]",
    ),
    click.option(
        "--sequences",
        default=960,
        show_default=True,
        type=click.IntRange(4),
        help="Texts; a tenth judge, and the others are fitted on.",
    ),
    click.option(
        "--length",
        type=click.IntRange(2),
        help="Tokens of a text at most.  [default: 128, beside a chat template that text is sampled behind; up to 1024 "
        "where texts, or prompts with room for an answer, are longer]",
    ),
    click.option(
        "--method",
        type=click.Choice(list(_METHODS)),
        help="The whole model by gradients; each layer in closed form; or each block by gradients. The last two have "
        "one block of each model in memory at a time.  [default: distil, or blocks if two models do not fit]",
    ),
    click.option("--passes", type=_POSITIVE, help="distil, blocks: over the texts.  [default: 4; 2]"),
    click.option(
        "--lr",
        type=_POSITIVE,
        help="distil, blocks: step, relative to a factor's size.  [default: 0.05; of distil without data 0.02]",
    ),
    click.option(
        "--bf16",
        is_flag=True,
        default=None,
        help="distil, blocks: multiply in bfloat16, for GPUs and CPUs with AMX or avx512_bf16; what is measured is in "
        "float32.",
    ),
    click.option(
        "--damping",
        type=_POSITIVE,
        help="compensated: how strongly layers are drawn to the tuned weights where text says little.  [default: 0.03]",
    ),
    click.option("--minutes", type=_POSITIVE, help="How long refining may take, with loading and judging."),
    click.option("--seed", default=0, show_default=True, help="Of everything that is drawn at random."),
)
_OWN = (
    "prompts",
    "texts",
    "field",
    "prefix",
    "sequences",
    "length",
    "method",
    "passes",
    "lr",
    "bf16",
    "damping",
    "shard",
    "minutes",
    "seed",
)
SHARD = click.option(
    "--shard",
    is_flag=True,
    default=None,
    help="distil: split both models among the processes that torchrun started.  [default: if no GPU holds them]",
)
"""Of commands that several processes may do."""
AND_REFINE = together(
    click.option(
        "--refine",
        is_flag=True,
        help="Fit the factors to what TUNED computes, as `phlora refine` does; if that fails, nothing is written.",
    ),
    REFINING,
)
"""Of commands that make an adapter, and may refine it."""


def refining_if_asked(options: dict[str, Any]) -> Refining | None:
    """What is asked for with `--refine`; None without it."""
    if options.pop("refine"):
        return refining(options)
    context = click.get_current_context()
    for name in _OWN:
        options.pop(name, None)
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} belongs to --refine.")
    return None


def refining(options: dict[str, Any]) -> Refining:
    """What these options ask for; they are taken out of all that a command was given."""
    from peft_posthoc.refinement.refining import Refining

    own = {name: options.pop(name, None) for name in _OWN}
    chosen = _method(own["method"], {name: own[name] for names in _METHODS.values() for name in names})
    given = texts_of(own["prompts"], own["texts"], own["field"], own["prefix"])
    numbers = {name: own[name] for name in ("sequences", "length", "minutes", "seed")}
    return Refining(given, chosen, **numbers)


def _method(name: str | None, options: Mapping[str, Any]) -> Method | Usual | None:
    import peft_posthoc
    from peft_posthoc.refinement.usual import Usual

    given = {key: value for key, value in options.items() if value is not None}
    if name is None:
        if not given:
            return None
        names = [method for method, own in _METHODS.items() if given.keys() <= {*own}]
        if not names:
            raise click.UsageError(f"No method takes {' and '.join(f'--{key}' for key in sorted(given))} together.")
        if len(names) > 1:
            return Usual(**given)
        (name,) = names
    for key in given.keys() - {*_METHODS[name]}:
        raise click.UsageError(f"--{key} does not belong to --method {name}.")
    chosen: Method = getattr(peft_posthoc, name)(**given)
    return chosen


def texts_of(prompts: Path | None, texts: Path | None, field: str | None, prefix: str | None = None) -> Texts:
    """Where text comes from."""
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
