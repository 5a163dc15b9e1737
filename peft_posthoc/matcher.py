"""A process of its own that matches regular expressions: `patterns` starts it, and ends it when it takes too long.

It reads one request as JSON from its standard input. Before each pattern it writes the pattern's number on a line, and
at the end the answer. The standard library only, so that it starts in a few hundredths of a second.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

# Of the memory that it may have, where the system knows such a limit; and of the characters of new names.
MEMORY = 2 << 30
CHARACTERS = 10**8


def limit_memory() -> None:
    """Let a pattern that eats memory fail here, not in the whole machine."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):  # Windows, macOS
        pass


def answer(how: str, patterns: Sequence[str], names: Sequence[str], replacement: str, first: bool) -> dict[str, Any]:
    """The matches of each pattern, as numbers of names; or the names with the matches replaced.

    Args:
        how: The function of a compiled pattern: `search`, `match`, `fullmatch`, or `sub`.
        patterns: The regular expressions.
        names: What they are held against.
        replacement: For `sub`.
        first: Whether a name that one pattern matches is not held against those after it.
    """
    found: list[Any] = []
    left = list(range(len(names)))
    for number, pattern in enumerate(patterns):
        print(number, flush=True)
        try:
            act = getattr(re.compile(pattern), how)
            if how == "sub":
                found = substituted(act, replacement, names)
                continue
            hits = [index for index in left if act(names[index])]
        except MemoryError:
            return {"error": "takes too much memory", "at": number}
        except RecursionError:
            return {"error": "is nested too deep", "at": number}
        except (re.error, OverflowError, IndexError) as error:
            return {"error": f"is not a regular expression: {error}", "at": number}
        found.append(hits)
        if first:
            known = set(hits)
            left = [index for index in left if index not in known]
    return {"found": found}


def substituted(act: Callable[[str, str], str], replacement: str, names: Sequence[str]) -> list[str]:
    """The names with what matches replaced."""
    found: list[str] = []
    count = 0
    for name in names:
        found.append(act(replacement, name))
        count += len(found[-1])
        if count > CHARACTERS:
            raise OverflowError("what it makes of the names is too long")
    return found


if __name__ == "__main__":
    limit_memory()
    print(json.dumps(answer(**json.load(sys.stdin))), flush=True)
