"""Regular expressions that somebody else wrote, matched as Python's `re` does, within a bound of time and memory.

`re` may need longer for `(a+)+x` than anyone can wait, and cannot be stopped. PEFT gives it the patterns of an
adapter's configuration; another matcher would tell nothing of what it does with them. So `re` itself runs them, in a
process that can be ended (`matcher`). What is a plain name, as most are, is compared here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from peft_posthoc import matcher
from peft_posthoc.text import asked

SECONDS = 5.0
"""Time for all patterns of one call; honest ones take thousandths."""

# Nothing that means anything but itself: letters, digits, `_`, `-`, and whatever else with a backslash before it.
_PLAIN = re.compile(r"(?:[\w-]|\\\W)*")

How = Literal["search", "match", "fullmatch"]


class PatternError(ValueError):
    """A pattern is no regular expression, or takes too long; the message goes on after the pattern itself."""

    def __init__(self, pattern: str, problem: str) -> None:
        super().__init__(f"`{pattern}` {problem}")
        self.pattern = pattern
        self.problem = problem


def check_patterns(patterns: Iterable[str]) -> None:
    """See whether they are regular expressions.

    Raises:
        PatternError: One of them is none.
    """
    unclear = [pattern for pattern in patterns if _plain(pattern) is None]
    if unclear:
        _ask("match", unclear, unclear, ())


def matched(pattern: str, names: Collection[str], how: How) -> set[str]:
    """The names that a pattern is found in (`search`), that begin with it (`match`) or that it is (`fullmatch`).

    Raises:
        PatternError: The pattern is no regular expression, or takes too long.
    """
    text = _plain(pattern)
    if text is not None and how == "search":
        return {name for name in names if text in name}
    if text is not None and how == "match":
        return {name for name in names if name.startswith(text)}
    if text is not None:
        return {text} & set(names)
    listed = list(names)
    (hits,) = _ask(how, [pattern], [pattern], listed)
    return {listed[index] for index in hits}


def asked_for(pattern: str, names: Collection[str], option: str) -> set[str]:
    """The names that a pattern of the user's is found in.

    Raises:
        ValueError: The pattern is no regular expression, or takes too long.
    """
    try:
        return matched(pattern, names, "search")
    except PatternError as error:
        raise ValueError(f"`{asked(option, pattern)}` {error.problem}.") from error


def first_matches(patterns: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """By name, the first of the patterns that it ends in, as PEFT reads the keys of `rank_pattern` and `alpha_pattern`.

    Raises:
        PatternError: A pattern is no regular expression, or all take too long.
    """
    keys, listed = list(patterns), list(names)
    if not keys or not listed:
        check_patterns(keys)
        return {}
    whole: dict[str, int] = {}
    ends: dict[str, int] = {}
    unclear: list[int] = []
    for number, key in enumerate(keys):
        text = _plain(key.removeprefix("^"))
        if text is None:
            unclear.append(number)
        else:
            (whole if key.startswith("^") else ends).setdefault(text, number)
    found: dict[str, int] = {}
    for name in listed:
        numbers = [ends[end] for end in _ends(name) if end in ends]
        numbers += [whole[name]] if name in whole else []
        if numbers:
            found[name] = min(numbers)
    # The `.` of PEFT's pattern matches no line break: what it makes of such names only `re` can tell.
    odd = [name for name in listed if "\n" in name]
    found = {name: number for name, number in found.items() if "\n" not in name}
    for unsure, among in ((unclear, listed), (range(len(keys)) if odd else (), odd)):
        if not unsure:
            continue
        wrapped = [rf"(.*\.)?({keys[number]})$" for number in unsure]
        hits = _ask("match", wrapped, [keys[number] for number in unsure], among, first=True)
        for number, indexes in zip(unsure, hits, strict=True):
            for index in indexes:
                found[among[index]] = min(number, found.get(among[index], number))
    return {name: keys[found[name]] for name in listed if name in found}


def replaced(pattern: str, replacement: str, names: Sequence[str]) -> list[str]:
    """The names, with the replacement in place of each match of the pattern.

    Raises:
        PatternError: They are no regular expression and its replacement, or take too long.
    """
    found: list[str] = _ask("sub", [pattern], [pattern], names, replacement=replacement)
    return found


def _plain(pattern: str) -> str | None:
    """The one text that a pattern matches; None if there may be others."""
    return re.sub(r"\\(\W)", r"\1", pattern) if _PLAIN.fullmatch(pattern) else None


def _ends(name: str) -> Iterable[str]:
    """A name, and what is left of it after each of its dots."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def _ask(
    how: str,
    patterns: Sequence[str],
    called: Sequence[str],
    names: Iterable[str],
    *,
    replacement: str = "",
    first: bool = False,
) -> Any:
    """The answer of `matcher.answer`.

    Args:
        how: As there.
        patterns: As there.
        called: What messages call the patterns.
        names: As there.
        replacement: As there.
        first: As there.

    Raises:
        PatternError: A pattern is no regular expression, or all take too long.
    """
    listed = list(names)
    asked = {"how": how, "patterns": patterns, "names": listed, "replacement": replacement, "first": first}
    # Isolated: nothing but the standard library is looked for, and nothing of the folder that we are in.
    line = [sys.executable, "-I", "-S", "-W", "ignore", str(Path(matcher.__file__))]
    try:
        done = subprocess.run(
            line, input=json.dumps(asked).encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=SECONDS
        )
        output, problem = done.stdout, "takes more memory than it may"
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        problem = f"takes longer than {SECONDS:g} s to match {len(listed)} name{'s' * (len(listed) != 1)}"
    lines = output.decode().splitlines()
    said: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if "found" in said:
        return said["found"]
    last = max((int(line) for line in lines if line.isdigit()), default=0)
    raise PatternError(called[said.get("at", last)], said.get("error", problem))
