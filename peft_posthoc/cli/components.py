"""`phlora extract --component`: parts of a diffusers pipeline, each with an adapter of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

COMPONENT = click.option(
    "--component",
    "components",
    multiple=True,
    metavar="NAME[=RANK]",
    help="Of pipelines: this part, such as transformer or text_encoder, into OUT/NAME; with --to into OUT. May be "
    "given again.",
)


class Component(NamedTuple):
    """A part of a pipeline, and what is asked for it."""

    base: str
    tuned: str
    out: Path
    rank: int | None
    """Its own, if it has one."""


def components_of(asked: Sequence[str], base: str, tuned: str, out: Path) -> list[Component]:
    """The parts that are asked for. A side that is no pipeline is the part itself, or a file that has them all.

    Raises:
        click.BadParameter: A pipeline has no such part, a rank is none, or several parts are of one file.
    """
    found = []
    for one in asked:
        name, _, rank = one.partition("=")
        if not name or (rank and not (rank.isdecimal() and int(rank) > 0)) or one.endswith("="):
            raise click.BadParameter(f"Give a name such as text_encoder, or text_encoder=8. Got `{one}`.")
        before, after = (_part(side, name, alone=len(asked) == 1) for side in (base, tuned))
        found.append(Component(before, after, out / name, int(rank) if rank else None))
    if len({each.out for each in found}) < len(found):
        raise click.BadParameter("The same component is given twice.")
    return found


def _part(side: str, name: str, *, alone: bool) -> str:
    part = Path(side) / name
    if part.is_dir():
        return str(part)
    if Path(side).is_file():  # A single file may have several.
        return side
    if (Path(side) / "model_index.json").is_file() or not alone:
        raise click.BadParameter(f"`{side}` has no folder `{name}`.")
    return side


def check_alone(components: Sequence[Any], **others: Any) -> None:
    """Refuse what says something of one adapter alone.

    Raises:
        click.UsageError: It is given.
    """
    given = [name for name, value in others.items() if value is not None]
    if components and given:
        raise click.UsageError(f"--component goes without --{given[0]}.")
