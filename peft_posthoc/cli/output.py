"""Output of every command: its result, and one line where something goes wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from peft_posthoc.errors import LeftOutWarning, OutputError, PosthocError, brief, one_line, printable
from peft_posthoc.files import write_whole
from peft_posthoc.text import asked_on


@contextlib.contextmanager
def one_line_errors(
    program: str, *, debug: bool, option: str = "--debug", nothing: str = "Nothing was written.", mistyped: int = 1
) -> Iterator[None]:
    """End the process with one line on stderr where something goes wrong; what is left out is told in a line, too.

    Args:
        program: What is running.
        debug: Show a traceback before it.
        option: What asks for that.
        nothing: What is told of the output after Ctrl-C.
        mistyped: The exit status for an argument that makes no sense: click's 2, where all are options.
    """

    def fail(message: str, status: int) -> NoReturn:
        if debug:
            traceback.print_exc()
        click.echo(f"{program}: error: {message}", err=True)
        sys.exit(status)

    try:
        with asked_on("command line"), _one_line_warnings():
            yield
    except click.ClickException as error:
        error.message = brief(error.message)  # type: ignore[misc]  # it is set by `__init__` alone, says click
        raise
    except (click.exceptions.Exit, click.Abort):
        raise
    except KeyboardInterrupt as interrupt:
        fail(" ".join(["Interrupted.", *(getattr(interrupt, "__notes__", None) or [nothing])]), 130)
    except MemoryError as error:
        fail(" ".join(["Out of memory.", *getattr(error, "__notes__", [])]), 1)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error
        if isinstance(cause, OSError) and cause.errno == errno.EPIPE and not hasattr(error, "__notes__"):
            raise cause from None  # Whoever reads our output has seen enough; click exits quietly.
        known = isinstance(error, PosthocError | ValueError | OSError)
        what = "" if known else f"Unexpected {type(error).__name__} (see it with {option}): "
        of_a_value = isinstance(error, ValueError) and not isinstance(error, UnicodeError | json.JSONDecodeError)
        fail(f"{what}{one_line(error)}", mistyped if of_a_value else 1)


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Our own warnings without the place in our code; those of others as they are."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, LeftOutWarning):
            click.echo(printable(f"Warning: {message}"), err=True)
        else:
            before(message, category, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def check_file(path: str | Path | None, option: str) -> None:
    """See before the work whether the file can be written after it."""
    if path is None or path == "-":
        return
    file = Path(path)
    if file.is_dir():
        raise PosthocError(f"`{option} {path}` is a folder. Name a file.")
    if not file.parent.is_dir():
        raise PosthocError(f"`{option} {path}` cannot be written: there is no folder `{file.parent}`.")


def check_drawing(path: Path | None, option: str) -> None:
    """See before the work whether there will be something to draw with."""
    check_file(path, option)
    if path is not None:
        from peft_posthoc.inspection.drawing import check_format

        check_format(path.suffix if option == "--plot" else ".svg")


def show(result: Any, json_to: str | None, *, quiet: bool, more: Iterable[str] = (), table: str | None = None) -> None:
    """Print a result as a table, and what more there is to say; or as JSON, or write that.

    Args:
        result: Of a command.
        json_to: A file for the JSON, `-` for standard output, None for none.
        quiet: Print no table.
        more: Lines behind it.
        table: To print in place of the result's own.

    Raises:
        OutputError: It cannot be printed or written.
    """
    if json_to is not None:
        text = json.dumps(result.to_dict(), indent=2, sort_keys=True)
        if json_to == "-":
            if sys.stdout is None:
                raise OutputError("Standard output is closed.")
            _print(text)
            return
        write_whole(json_to, text + "\n")
    if quiet:
        warnings = getattr(result, "warnings", ())
        for warning in warnings() if callable(warnings) else warnings:
            click.echo(printable(f"Warning: {warning}"), err=True)
    else:
        _print(printable("\n".join([result.table() if table is None else table, *more])))


def quiet_hosts() -> None:
    """Keep the progress bars and the advice of the libraries that load the models from burying ours."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\.")


def _print(text: str) -> None:
    try:
        click.echo(text)
    except OSError as error:
        # The interpreter would try once more to write the rest, and fail, when it ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"Standard output could not be written: {error.strerror or error}.") from error
