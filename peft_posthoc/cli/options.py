"""The options that commands share: those of an extraction from their one list, and those of the output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from peft_posthoc.cli.ranks import RANK_PATTERN
from peft_posthoc.extraction.request import OPTIONS
from peft_posthoc.text import as_share, type_name

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = OPTIONS["dtype"].choices


class _Type(click.Choice[str]):
    """A type of numbers, as people write it: `bf16` too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(type_name(value), param, ctx)


class _Share(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2
    """A share: `0.9` or `90%`."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return as_share(str(value))
        except ValueError:
            self.fail(f"{value!r} is no share such as 0.9 or 90%.", param, ctx)


TYPE, SHARE = _Type(DTYPES), _Share()


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in their order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def option(name: str, **changes: Any) -> Callable[[F], F]:
    """An option of an extraction as click's.

    Args:
        name: Its name in `Options`.
        changes: What is otherwise on this command.
    """
    if name == "rank_pattern":
        return RANK_PATTERN
    asked = OPTIONS[name]
    given: dict[str, Any] = {"help": asked.help, "metavar": asked.metavar or None}
    if asked.choices:
        given["type"] = TYPE if name == "dtype" else click.Choice(asked.choices)
    if asked.default == ():
        given["multiple"] = True
    elif asked.default is False:
        given["is_flag"] = True
    elif name == "min_energy":
        given["type"] = SHARE
    elif asked.default is not None:
        given |= {"default": asked.default, "show_default": True}
    flag = f"--{(asked.flag or name).replace('_', '-')}" + (f"/--{asked.opposite}" if asked.opposite else "")
    return click.option(flag, name, **(given | changes))


CHOICE = together(*map(option, ("include", "exclude", "embeddings", "head", "conv", "experts", "exact")))
NAMES = together(*map(option, ("rename", "serve_as")))
MODELS = together(*map(option, ("base_revision", "tuned_revision", "device")))
"""Of the two models: their revisions, and where to compute with them."""
HTML = click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a page for a browser, with drawings and sortable tables.",
)
LAYERS = click.option("--layers", is_flag=True, help="Show a row for every weight, not for every kind of module.")
OUTPUT = together(
    click.option("--quiet", is_flag=True, help="No progress bar, no table: warnings and errors only."),
    click.option(
        "--json",
        "json_to",
        is_flag=False,
        flag_value="-",
        metavar="[FILE]",
        help="Write the result as JSON into FILE (.json), or to stdout in place of the table.",
    ),
    # Read by the group, for every command.
    click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback when something goes wrong."),
)


def dtype_of(name: str | None) -> Any:
    """The type of that name; None for none."""
    if name is None:
        return None
    import torch

    return getattr(torch, name)
