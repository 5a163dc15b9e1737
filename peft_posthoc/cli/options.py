"""The options that commands share: the same flags mean the same on all of them. Ranks are in `rank_options`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = ("float32", "bfloat16", "float16")


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in their order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


SERVE_AS = click.option(
    "--serve-as",
    metavar="CLASS",
    help="The class, or a model's folder, that the adapter is for.  [default: BASE's]",
)
NAMES = together(
    click.option(
        "--map",
        "rename",
        multiple=True,
        metavar="'REGEX=>NAME'",
        help="Rename tensors of both before they are compared.",
    ),
    SERVE_AS,
)
MODELS = together(
    click.option("--base-revision", metavar="REV", help="Branch, tag or commit, where BASE is a hub id."),
    click.option("--tuned-revision", metavar="REV", help="Branch, tag or commit, where TUNED is a hub id."),
    click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda or auto."),
)
VOCABS = click.Choice(("error", "truncate", "extend"))
VOCAB = click.option(
    "--vocab",
    type=VOCABS,
    default="error",
    show_default=True,
    help="Where the vocabularies differ: stop, compare what both have, or keep tuned's embeddings whole (--form peft).",
)
HTML = click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a page with drawings and tables that can be sorted, for a browser.",
)
DTYPE = click.option("--dtype", type=click.Choice(DTYPES), help="Of the adapter.  [default: the tuned checkpoint's]")
FORM = click.option(
    "--form",
    type=click.Choice(("portable", "peft")),
    default="portable",
    show_default=True,
    help="portable: what every engine loads. peft: all that changed, as exactly as PEFT can hold it.",
)
CHOICE = together(
    click.option("--include", multiple=True, metavar="REGEX", help="Carry only weights whose name this is found in."),
    click.option("--exclude", multiple=True, metavar="REGEX", help="Do not carry weights whose name this is found in."),
    click.option("--embeddings", is_flag=True, help="Carry token embeddings too."),
    click.option("--head", is_flag=True, help="Carry the output head (lm_head) too."),
    click.option("--conv", is_flag=True, help="Carry convolutions too."),
    click.option(
        "--experts",
        type=click.Choice(("none", "per-expert", "fused")),
        help="Carry experts: per-expert for serving engines, fused for PEFT.  [default: none; fused in --form peft]",
    ),
    click.option("--exact", is_flag=True, help="LAPACK's full SVD for every weight."),
)
OUTPUT = together(
    click.option("--quiet", is_flag=True, help="No progress bar, no table: errors only."),
    click.option(
        "--json",
        "json_to",
        is_flag=False,
        flag_value="-",
        metavar="[FILE]",
        help="Write the result as JSON into FILE, or to stdout in place of the table.",
    ),
    click.option("--debug", is_flag=True, help="Show a traceback when something goes wrong."),
)


def dtype_of(name: str | None) -> Any:
    """The type that `DTYPE` says; None for the tuned checkpoint's."""
    if name is None:
        return None
    import torch

    return getattr(torch, name)
