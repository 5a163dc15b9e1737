"""Errors, as one tree.

    PosthocError                    everything below; the command line prints it as one line
    ├── CheckpointError             a checkpoint cannot be found, read or trusted
    │   └── FetchError              it cannot be fetched now; what is done is kept, and gone on with
    ├── MismatchError               base and tuned are not two states of one model
    ├── NothingToCarryError         nothing changed, or nothing of what changed has a LoRA form
    ├── AdapterError                an adapter folder cannot be read, written or fitted to a model
    ├── OutputError                 a file beside the adapter, or standard output, cannot be written
    ├── MissingExtraError           an optional dependency is not installed
    └── ShareDone                   no fault: this process of several is done, and another one has the result

Arguments that make no sense by themselves (a rank of 0, an unknown device) are `ValueError`, as everywhere in Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


class PosthocError(Exception):
    """Base class of all errors that say something about the user's models or folders."""


class CheckpointError(PosthocError):
    """A checkpoint cannot be found, read or trusted."""


class FetchError(CheckpointError):
    """A part of a checkpoint cannot be fetched now; the same command goes on from what is done."""


class MismatchError(PosthocError):
    """Base and tuned are not two states of one model."""


class NothingToCarryError(PosthocError):
    """Nothing changed between base and tuned, or nothing of what changed has a LoRA form."""


class AdapterError(PosthocError):
    """An adapter folder cannot be read, written or fitted to a model."""


class OutputError(PosthocError):
    """A report, a picture or a page cannot be written."""


class MissingExtraError(PosthocError):
    """An optional dependency is not installed."""


class ShareDone(PosthocError):
    """This process has done its share of the weights; the first process has the adapter."""


class LeftOutWarning(UserWarning):
    """Something that changed is not in the adapter; the command line has it in its table."""


# Characters of an error's line, and of one word in it: a name, a value. More tells nobody anything.
_LINE = 2000
_WORD = 200
# The same where nothing went wrong: a path in a command is to be copied.
_LONGEST = 500


def one_line(error: BaseException) -> str:
    """An error and the notes that its callers added, as a single line that a terminal can show."""
    parts = [str(error) or type(error).__name__, *getattr(error, "__notes__", [])]
    lines = [" ".join(part.split()) for part in parts]
    ended = [line if line.endswith((".", "!", "?", ":")) else f"{line}." for line in lines[:-1]]
    return brief(" ".join([*ended, lines[-1]]))


@contextmanager
def noting(sentence: str) -> Iterator[None]:
    """Add a sentence to whatever fails in the `with` block, or interrupts it: "The adapter is at `out`."."""
    try:
        yield
    except BaseException as error:
        error.add_note(sentence)
        raise


def brief(text: str) -> str:
    """A message as a single line: long names and values without their middle, and nothing that a terminal obeys."""
    words = [_cut(word, _WORD) for word in text.split()]
    return _cut(printable(" ".join(words)), _LINE)


def printable(text: str) -> str:
    """A text with what a terminal would obey, such as an escape in the name of a tensor, spelled out; lines stay.

    A name that nobody reads to its end loses its middle.
    """
    text = re.sub(rf"\S{{{_LONGEST},}}", lambda long: _cut(long[0], _LONGEST), text)
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in text)


def _cut(text: str, width: int) -> str:
    """A text without its middle, if it is longer."""
    return text if len(text) <= width else f"{text[: width * 3 // 4 - 5]} ... {text[-width // 4 :]}"
