"""How ranks are asked for on a command line: the options of every command, and the rule that they say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from peft_posthoc.extraction.request import OPTIONS
from peft_posthoc.json_file import parse_json
from peft_posthoc.patterns import PatternError, check_patterns
from peft_posthoc.ranks.words import SHARED, WORDS

if TYPE_CHECKING:
    from peft_posthoc.linalg.spectrum import RankRule
    from peft_posthoc.ranks.rules import Allocation

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--energy", metavar="E[,E...]", help="Keep the fewest that hold this share of the delta's energy."),
    click.option("--error", metavar="E[,E...]", help="Keep the fewest with a relative error of at most this."),
    click.option("--budget", metavar="SIZE", help="Share out ranks within 64MB, or 2% of the tuned checkpoint."),
    click.option("--params", type=int, metavar="N", help="Share out ranks within so many parameters."),
    click.option(
        "--weighting",
        metavar="NAME",
        help="How a budget is shared out: balanced, early, uniform, energy, relative.  [default: balanced]",
    ),
    click.option("--max-rank", type=int, metavar="R", help="No layer gets more."),
    click.option("--min-rank", type=int, metavar="R", help="No layer gets less, if it is large enough."),
    click.option(
        "--round-to", type=int, metavar="R", help="Ranks are multiples of this: rounded up, in a budget down."
    ),
)
# Bytes of a file of ranks by hand: a pipe or a device may have no end.
_LARGEST = 10_000_000


def ranks(default: str) -> Callable[[F], F]:
    """The options that ask for ranks. The command gets `rank`, an `Asked`.

    Args:
        default: The rank that the command keeps where none is asked for, in words.
    """
    text = f"Singular triplets to keep; auto: those above the noise.  [default: {default}]"

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def told(*args: Any, **options: Any) -> Any:
            chosen = {name: options.pop(name) for name in WORDS}
            return command(*args, rank=Asked(chosen), **options)

        for option in reversed((click.option("--rank", metavar="R[,R...]", help=text), *_OPTIONS)):
            told = option(told)
        return told  # type: ignore[return-value]

    return decorate


RANK = ranks("32")


class Asked(NamedTuple):
    """The options that ask for ranks, as they were given."""

    options: Mapping[str, Any]

    def given(self) -> list[str]:
        """The options that are there."""
        return [name for name, value in self.options.items() if value is not None]

    def shares_out(self) -> bool:
        """Tell whether ranks are shared out among all layers."""
        return any(self.options[name] is not None for name in SHARED)

    def rule(self) -> RankRule | Allocation | None:
        """The rule; None if the options say nothing.

        Raises:
            click.UsageError: They contradict one another, or are no numbers.
            ValueError: A value makes no sense.
        """
        if not self.given():
            return None  # and nothing is imported for it
        from peft_posthoc.ranks.spelling import Misspelled, parse

        try:
            return parse(self.options)
        except Misspelled as error:
            raise click.UsageError(str(error)) from error

    def one(self) -> RankRule | Allocation | None:
        """The rule, where only one adapter is made.

        Raises:
            click.UsageError: Several are asked for.
        """
        from peft_posthoc.ranks.rules import several

        rule = self.rule()
        if isinstance(rule, several):
            raise click.UsageError("Only `phlora extract` makes several adapters at once. Give one rank.")
        return rule


RANK_PATTERN = click.option(
    "--rank-pattern",
    metavar="FILE",
    callback=lambda context, parameter, value: pattern_of(value),
    help=f"{OPTIONS['rank_pattern'].help} JSON, or a file of it.",
)


def _text(file: Path) -> str:
    """The text of a file that the user names, which may be a pipe.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(_LARGEST + 1)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    if len(content) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST} bytes")
    return content.decode()


def pattern_of(value: str | None) -> dict[str, int]:
    """The patterns in a JSON file, or in the JSON itself.

    Raises:
        click.BadParameter: There are none.
    """
    if value is None:
        return {}
    hint = "--rank-pattern"
    try:
        read = parse_json(value if value.lstrip().startswith("{") else _text(Path(value)))
    except ValueError as error:
        raise click.BadParameter(f"`{value}` is no JSON file: {error}.", param_hint=hint) from error
    if not isinstance(read, dict) or not read:
        raise click.BadParameter(f'`{value}` must hold an object such as {{"q_proj": 16}}.', param_hint=hint)
    try:
        check_patterns(read)
    except PatternError as error:
        raise click.BadParameter(f"{error}.", param_hint=hint) from error
    for pattern, rank in read.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise click.BadParameter(
                f"The rank of `{pattern}` must be whole and at least 1. Got {rank!r}.", param_hint=hint
            )
    return read
