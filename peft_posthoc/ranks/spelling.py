"""How a rank is spelled where there are no Python objects: on a command line, in YAML, in JSON.

A rule is said by at most one of `rank`, `energy`, `error`, `budget` and `params`, by `weighting` beside one of the
last two, and by the limits `max_rank`, `min_rank` and `round_to`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_posthoc.linalg.spectrum import RankRule
from peft_posthoc.ranks.budget import budget
from peft_posthoc.ranks.rules import (
    Allocation,
    Rank,
    above_noise,
    as_rule,
    fixed,
    keep_energy,
    keep_error,
    limited,
    several,
)
from peft_posthoc.ranks.weighting import WEIGHTINGS
from peft_posthoc.ranks.words import LIMITS, RULES, SHARED
from peft_posthoc.text import as_share, asked

_PREFIX = {"rank": "r", "energy": "e", "error": "error"}


class Misspelled(ValueError):
    """Words that say no rank, whatever their values: two that exclude each other, or a number that is none."""


def spell(rank: Rank | Mapping[str, Rank]) -> dict[str, Any]:
    """The words for a rank, as plain JSON values.

    Raises:
        ValueError: There are none: it is a function, or several ranks.
    """
    if isinstance(rank, Mapping):
        raise ValueError("Ranks by weight have no words: they are for this process alone.")
    match as_rule(rank):
        case fixed(number):
            return {"rank": number}
        case keep_energy(share):
            return {"energy": share}
        case keep_error(error):
            return {"error": error}
        case above_noise():
            return {"rank": "auto"}
        case limited(rule) as limits:
            return spell(rule) | _limits(limits)
        case budget() as shared if (name := _named(shared)) is not None:
            size = {"budget": str(shared.size)} if shared.params is None else {"params": shared.params}
            return size | {"weighting": name} | _limits(shared)
        case rule:
            raise ValueError(f"The rank rule {rule!r} is none that words are known for.")


def flags(rank: Rank) -> list[str]:
    """The options of a command line that say a rank.

    Raises:
        ValueError: None do.
    """
    said = spell(rank)
    if said.get("weighting") == "balanced":
        del said["weighting"]
    return [word for name, value in said.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def parse(said: Mapping[str, Any]) -> RankRule | Allocation | None:
    """The rule that words say; None if they say nothing.

    Args:
        said: By name; what is None is not said. `rank`, `energy` and `error` may be several, between commas, which
            make one rule of them.

    Raises:
        Misspelled: They contradict one another, or are no numbers.
        ValueError: A value makes no sense.
    """
    given = {name: value for name in RULES if (value := said.get(name)) is not None}
    limits = {field: value for name, field in LIMITS.items() if (value := said.get(name)) is not None}
    weighting = said.get("weighting")
    if len(given) > 1:
        raise Misspelled(f"Give {' or '.join(asked(name, None) for name in given)}, not both.")
    if weighting is not None and not given.keys() & set(SHARED):
        raise Misspelled(f"{asked('weighting', None)} is one of {asked('budget', None)} or {asked('params', None)}.")
    if not given and not limits:
        return None
    name, value = next(iter(given.items()), ("rank", "32"))
    if name in SHARED:
        if (weighting or "balanced") not in WEIGHTINGS:
            raise Misspelled(f"{asked('weighting', None)} must be one of {', '.join(WEIGHTINGS)}. Got {weighting!r}.")
        within: dict[str, Any] = {"size": value} if name == "budget" else {"params": value}
        return budget(**within, weighting=WEIGHTINGS[weighting or "balanced"], **limits)

    def one(text: str) -> RankRule:
        rule = _rule(name, text)
        return limited(rule, **limits) if limits else rule

    texts = [text.strip() for text in str(value).split(",")]
    if len(texts) == 1:
        return one(texts[0])
    return several(tuple((_PREFIX[name] + _folder(text) if text != "auto" else text, one(text)) for text in texts))


def _rule(name: str, text: str) -> RankRule:
    if name == "rank" and text == "auto":
        return above_noise()
    try:
        number = int(text) if name == "rank" else as_share(text)
    except ValueError as error:
        if name == "rank" and _is_share(text):
            raise Misspelled(
                f"{asked(name, None)}: '{text}' is no number of singular triplets. To keep a share of the energy, give "
                f"`{asked('energy', text)}`."
            ) from error
        what = "integer, nor `auto`" if name == "rank" else "float"
        raise Misspelled(f"{asked(name, None)}: '{text}' is not a valid {what}.") from error
    if name == "rank":
        return fixed(int(number))
    return keep_energy(number) if name == "energy" else keep_error(number)


def _folder(text: str) -> str:
    return f"{as_share(text):g}" if text.endswith("%") else text


def _is_share(text: str) -> bool:
    try:
        return 0 < as_share(text) <= 1
    except ValueError:
        return False


def _limits(rule: limited | budget) -> dict[str, int]:
    usual = {"most": None, "least": 1, "multiple": 1}
    return {name: value for name, field in LIMITS.items() if (value := getattr(rule, field)) != usual[field]}


def _named(rule: budget) -> str | None:
    """The name of a budget's weighting; None if it has none, or the budget is one that only Python can say."""
    usual = rule.floor == budget(size=1).floor
    return next((name for name, one in WEIGHTINGS.items() if one == rule.weighting), None) if usual else None
