"""What can go wrong, as one tree.

    PosthocError                    everything below; the command line prints it as one line
    ├── CheckpointError             a checkpoint cannot be found, read or trusted
    ├── MismatchError               base and tuned are not two states of one model
    ├── NothingToCarryError         nothing changed, or nothing of what changed has a LoRA form
    ├── AdapterError                an adapter folder cannot be read, written or fitted to a model
    ├── OutputError                 a file beside the adapter, or standard output, cannot be written
    ├── MissingExtraError           an optional dependency is not installed
    └── ShareDone                   no fault: this process of several is done, and another one has the result

Arguments that make no sense by themselves (a rank of 0, an unknown device) are `ValueError`, as everywhere in Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class PosthocError(Exception):
    """Base class of all errors that say something about the user's models or folders."""


class CheckpointError(PosthocError):
    """A checkpoint cannot be found, read or trusted."""


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


def one_line(error: BaseException) -> str:
    """An error and the notes that its callers added, as a single line."""
    parts = [str(error) or type(error).__name__, *getattr(error, "__notes__", [])]
    lines = [" ".join(part.split()) for part in parts]
    ended = [line if line.endswith((".", "!", "?", ":")) else f"{line}." for line in lines[:-1]]
    return " ".join([*ended, lines[-1]])


@contextmanager
def noting(sentence: str) -> Iterator[None]:
    """Add a sentence to whatever fails in the `with` block, or interrupts it: "The adapter is at `out`."."""
    try:
        yield
    except BaseException as error:
        error.add_note(sentence)
        raise
