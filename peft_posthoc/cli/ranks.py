"""How ranks are asked for on a command line: the options of every command, and the rule that they say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from peft_posthoc.json_file import parse_json, read_json
from peft_posthoc.patterns import PatternError, check_patterns

if TYPE_CHECKING:
    from peft_posthoc.linalg.spectrum import RankRule
    from peft_posthoc.ranks.rules import Allocation

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--rank", metavar="R[,R...]", help="Singular triplets to keep; auto: above the noise.  [default: 32]"),
    click.option("--energy", metavar="E[,E...]", help="Keep the fewest that hold this share of the delta's energy."),
    click.option("--error", metavar="E[,E...]", help="Keep the fewest with a relative error of at most this."),
    click.option("--budget", metavar="SIZE", help="Share out ranks within 64MB, or 2% of the tuned checkpoint."),
    click.option("--params", type=int, metavar="N", help="Share out ranks within so many parameters."),
    click.option(
        "--weighting",
        metavar="NAME",
        help="Of a budget: balanced, early, uniform, energy, relative.  [default: balanced]",
    ),
    click.option("--max-rank", type=int, metavar="R", help="No layer gets more."),
    click.option("--min-rank", type=int, metavar="R", help="No layer gets less, if it is large enough."),
    click.option(
        "--round-to", type=int, metavar="R", help="Ranks are multiples of this: rounded up, in a budget down."
    ),
)
_RULES = ("rank", "energy", "error", "budget", "params")
_LIMITS = {"max_rank": "most", "min_rank": "least", "round_to": "multiple"}
_SHARED = ("budget", "params")
_PREFIX = {"rank": "r", "energy": "e", "error": "error"}


def RANK(command: F) -> F:
    """The options that ask for ranks. The command gets `rank`, an `Asked`."""

    @functools.wraps(command)
    def told(*args: Any, **options: Any) -> Any:
        chosen = {name: options.pop(name) for name in (*_RULES, "weighting", *_LIMITS)}
        return command(*args, rank=Asked(chosen), **options)

    for option in reversed(_OPTIONS):
        told = option(told)
    return told  # type: ignore[return-value]


class Asked(NamedTuple):
    """What the options say."""

    options: Mapping[str, Any]

    def given(self) -> list[str]:
        """The options that are there."""
        return [name for name, value in self.options.items() if value is not None]

    def shares_out(self) -> bool:
        """Whether ranks are shared out among all layers."""
        return any(self.options[name] is not None for name in _SHARED)

    def rule(self) -> Any:
        """The rule; None if there is none. Raises as `rule_of`."""
        return rule_of(**self.options)

    def one(self) -> Any:
        """The same, where only one adapter is made.

        Raises:
            click.UsageError: Several are asked for.
        """
        from peft_posthoc.ranks.rules import several

        rule = self.rule()
        if isinstance(rule, several):
            raise click.UsageError("Only `phlora extract` makes several adapters at once. Give one rank.")
        return rule


def rule_of(*, weighting: str | None = None, **asked: Any) -> RankRule | Allocation | None:
    """The rule that the options say; None if they say nothing.

    Several values, between commas, make one rule of them: `several`.

    Raises:
        click.UsageError: They contradict one another.
        ValueError: A value makes no sense.
    """
    given = {name: value for name in _RULES if (value := asked.get(name)) is not None}
    limits = {field: value for name, field in _LIMITS.items() if (value := asked.get(name)) is not None}
    if len(given) > 1:
        raise click.UsageError(f"Give {' or '.join(f'--{name}' for name in given)}, not both.")
    if weighting is not None and not given.keys() & set(_SHARED):
        raise click.UsageError("--weighting is one of --budget or --params.")
    if not given and not limits:
        return None
    from peft_posthoc.ranks.budget import budget
    from peft_posthoc.ranks.rules import limited, several
    from peft_posthoc.ranks.weighting import WEIGHTINGS

    name, value = next(iter(given.items()), ("rank", "32"))
    if name in _SHARED:
        if (weighting or "balanced") not in WEIGHTINGS:
            raise click.UsageError(f"--weighting must be one of {', '.join(WEIGHTINGS)}. Got {weighting!r}.")
        within: dict[str, Any] = {"size": value} if name == "budget" else {"params": value}
        return budget(**within, weighting=WEIGHTINGS[weighting or "balanced"], **limits)

    def one(text: str) -> RankRule:
        rule = _number(name, text)
        return limited(rule, **limits) if limits else rule

    texts = [text.strip() for text in str(value).split(",")]
    if len(texts) == 1:
        return one(texts[0])
    return several(tuple((_PREFIX[name] + text if text != "auto" else text, one(text)) for text in texts))


def _number(name: str, text: str) -> RankRule:
    """The rule that one value says.

    Raises:
        click.BadParameter: It says none.
    """
    from peft_posthoc.ranks.rules import above_noise, fixed, keep_energy, keep_error

    if name == "rank" and text == "auto":
        return above_noise()
    try:
        number = int(text) if name == "rank" else float(text)
    except ValueError as error:
        what = "integer, nor `auto`" if name == "rank" else "float"
        raise click.BadParameter(f"'{text}' is not a valid {what}.", param_hint=f"--{name}") from error
    if name == "rank":
        return fixed(int(number))
    return keep_energy(number) if name == "energy" else keep_error(number)


RANK_PATTERN = click.option(
    "--rank-pattern",
    metavar="FILE",
    callback=lambda context, parameter, value: pattern_of(value),
    help="JSON: ranks by hand, for modules whose name ends in a regular expression.",
)


def pattern_of(value: str | None) -> dict[str, int]:
    """The patterns in a JSON file, or in the JSON itself.

    Raises:
        click.BadParameter: There are none.
    """
    if value is None:
        return {}
    hint = "--rank-pattern"
    try:
        read = parse_json(value) if value.lstrip().startswith("{") else read_json(Path(value))
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
