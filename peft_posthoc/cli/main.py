"""The `phlora` command."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import click

from peft_posthoc.cli.options import CHOICE, DTYPE, FORM, HTML, MODELS, NAMES, OUTPUT, VOCAB, dtype_of
from peft_posthoc.cli.ranks import RANK, RANK_PATTERN, Asked
from peft_posthoc.errors import OutputError, PosthocError, ShareDone, brief, noting, one_line, printable
from peft_posthoc.files import write_whole
from peft_posthoc.models.remote_code import no_prompts

# Packages beside this one add commands to `phlora` by entry points of this group.
COMMANDS = "peft_posthoc.commands"
# Commands that have a file of their own: it is loaded when one is called for.
_ELSEWHERE = {
    "check": "peft_posthoc.cli.check",
    "combine": "peft_posthoc.cli.resize",
    "export": "peft_posthoc.cli.export",
    "resize": "peft_posthoc.cli.resize",
}


class _Command(click.Group):
    """Turns errors into one line on stderr, and Ctrl-C into the usual exit status."""

    # Here and not in `main`: there click has already turned Ctrl-C into its own message and a status of 1.
    def invoke(self, ctx: click.Context) -> Any:
        if "--quiet" in ctx.args:
            # Read by the hub's client when it is first imported.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with one_line_errors("phlora", debug="--debug" in ctx.args), no_prompts():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE, *metadata.entry_points(group=COMMANDS).names])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in _ELSEWHERE:
            found: click.Command = getattr(importlib.import_module(_ELSEWHERE[name]), name)
            return found
        own = super().get_command(ctx, name)
        added = () if own else metadata.entry_points(group=COMMANDS, name=name)
        return next((point.load() for point in added), own)


@contextlib.contextmanager
def one_line_errors(
    program: str, *, debug: bool, option: str = "--debug", nothing: str = "Nothing was written."
) -> Iterator[None]:
    """End the process with one line on stderr where something goes wrong.

    Args:
        program: What is running.
        debug: Show a traceback before it.
        option: What asks for that.
        nothing: What is told of the output after Ctrl-C.
    """

    def fail(message: str, status: int) -> NoReturn:
        if debug:
            traceback.print_exc()
        click.echo(f"{program}: error: {message}", err=True)
        sys.exit(status)

    try:
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
        fail(f"{what}{one_line(error)}", 1)


@click.group(cls=_Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="peft-posthoc", prog_name="phlora")
def main() -> None:
    """Post-hoc LoRA: a portable adapter from a base model and a full fine-tune of it.

    BASE and TUNED are model folders (safetensors or .bin, single or sharded), single files or hub ids (org/name),
    or a model with a LoRA adapter on it (MODEL+ADAPTER).
    """


@main.command()
@click.argument("base")
@click.argument("tuned")
@click.argument("out", type=click.Path(path_type=Path))
@RANK
@RANK_PATTERN
@DTYPE
@click.option("--tuned-name", metavar="NAME", help="What the adapter calls TUNED.  [default: TUNED]")
@click.option("--force", is_flag=True, help="Replace an adapter that is at OUT; what else lies there stays.")
@click.option("--dry-run", is_flag=True, help="Read headers only, show what would be done, and write nothing.")
@HTML
@FORM
@CHOICE
@VOCAB
@NAMES
@MODELS
@OUTPUT
def extract(
    base: str,
    tuned: str,
    out: Path,
    rank: Asked,
    dtype: str | None,
    force: bool,
    dry_run: bool,
    html: Path | None,
    quiet: bool,
    json_to: str | None,
    debug: bool,
    **options: Any,
) -> None:
    """Write the LoRA adapter that leads from BASE to TUNED into the folder OUT.

    With several ranks between commas, as in --rank 8,16,32, the adapters are OUT/r8, OUT/r16, OUT/r32, of one
    factorization.
    """
    del debug  # Read by the group.
    rule = rank.rule()
    from peft_posthoc.adapters.writer import check_target
    from peft_posthoc.extraction.extract import extract as run
    from peft_posthoc.extraction.preflight import preflight
    from peft_posthoc.extraction.processes import Processes
    from peft_posthoc.extraction.series import Series, check_targets
    from peft_posthoc.ranks.rules import several

    # Bad arguments are told before the work, not after it.
    check_file(json_to, "--json")
    _check_drawing(html, "--html")
    if isinstance(rule, several):
        check_targets(out, dict(rule.named), force=force)
    else:
        check_target(out, force=force)
    if dry_run:
        del options["tuned_name"]
        show(preflight(base, tuned, rule or 32, dtype=dtype_of(dtype), out=out, **options), json_to, quiet=quiet)
        return
    processes = Processes.from_environment()
    try:
        adapter = run(
            base, tuned, rule or 32, dtype=dtype_of(dtype), out=out, processes=processes, progress=not quiet, **options
        )
    except ShareDone:
        return
    found = Series.of(adapter, rule) if isinstance(rule, several) else adapter
    found.save(out, force=force)
    several_of_them = isinstance(found, Series)
    with noting(f"The {'adapters are' if several_of_them else 'adapter is'} at `{out}`."):
        if html is not None:
            from peft_posthoc.inspection.inspection import Inspection

            made = found.adapters if isinstance(found, Series) else {"as written": adapter}
            Inspection.of(adapter, made).html(html)
        done = f"{'Adapters' if several_of_them else 'Adapter'} written to {out}"
        show(found if isinstance(found, Series) else found.report, json_to, quiet=quiet, more=[done])


@main.command()
@click.argument("base")
@click.argument("tuned")
@click.option("--max-rank", type=click.IntRange(min=1), default=512, show_default=True, help="Where the curves end.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw the curves and the ranks into this PNG (or SVG, PDF).",
)
@HTML
@FORM
@CHOICE
@VOCAB
@NAMES
@MODELS
@OUTPUT
def inspect(
    base: str,
    tuned: str,
    max_rank: int,
    plot: Path | None,
    html: Path | None,
    quiet: bool,
    json_to: str | None,
    debug: bool,
    **options: Any,
) -> None:
    """Show what every rank and every rank rule would keep of each delta, and take; write no adapter."""
    del debug
    check_file(json_to, "--json")
    _check_drawing(plot, "--plot")
    _check_drawing(html, "--html")
    from peft_posthoc.inspection.inspection import inspect as run

    inspection = run(base, tuned, max_rank, progress=not quiet, **options)
    with contextlib.ExitStack() as written:
        if plot is not None:
            inspection.plot(plot)
            written.enter_context(noting(f"`{plot}` is written."))
        if html is not None:
            inspection.html(html)
            written.enter_context(noting(f"`{html}` is written."))
        show(inspection, json_to, quiet=quiet)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The model before.")
@click.option("--tuned", required=True, help="The model after.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Compare the models' outputs on this text.")
@click.option("--token-ids", multiple=True, metavar="'1 2 3'", help="The same, already tokenized.")
@click.option("--weights-only", is_flag=True, help="Do not load the models to compare outputs.")
@click.option("--min-cosine", type=float, help="Fail if the adapter's cosine with the whole delta is below.")
@click.option("--max-kl", type=float, help="Fail if KL(tuned || base + adapter) per token, in nats, is above.")
@NAMES
@MODELS
@OUTPUT
def verify(
    out: Path,
    base: str,
    tuned: str,
    token_ids: tuple[str, ...],
    weights_only: bool,
    min_cosine: float | None,
    max_kl: float | None,
    quiet: bool,
    json_to: str | None,
    debug: bool,
    **options: Any,
) -> None:
    """Compare BASE plus the adapter in OUT with TUNED: weights, then outputs."""
    del debug
    check_file(json_to, "--json")
    from peft_posthoc.verification.verify import verify as run

    ids = [_token_ids(text) for text in token_ids]
    if not weights_only:
        _quiet_hosts()
    result = run(out, base, tuned, token_ids=ids, outputs=not weights_only, progress=not quiet, **options)
    show(result, json_to, quiet=quiet)
    if min_cosine is not None and result.cosine < min_cosine:
        raise PosthocError(f"The cosine with the whole delta is {result.cosine:.4f}, below --min-cosine {min_cosine}.")
    if max_kl is not None:
        if result.adapter is None or result.adapter.kl is None:
            raise PosthocError(f"--max-kl cannot be checked: no logits were compared ({result.outputs_note}).")
        if result.adapter.kl > max_kl:
            raise PosthocError(f"KL(tuned || base + adapter) is {result.adapter.kl:.5f} nats, above --max-kl {max_kl}.")


def check_file(path: str | Path | None, option: str) -> None:
    """See before the work whether the file can be written after it."""
    if path is None or path == "-":
        return
    file = Path(path)
    if file.is_dir():
        raise PosthocError(f"`{option} {path}` is a folder. Name a file.")
    if not file.parent.is_dir():
        raise PosthocError(f"`{option} {path}` cannot be written: there is no folder `{file.parent}`.")


def _check_drawing(path: Path | None, option: str) -> None:
    """See before the work whether there will be something to draw with."""
    check_file(path, option)
    if path is not None:
        from peft_posthoc.inspection.plots import check_format

        check_format(path.suffix if option == "--plot" else ".svg")


def _quiet_hosts() -> None:
    """Keep the progress bars and the advice of the libraries that load the models from burying ours."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _token_ids(text: str) -> list[int]:
    try:
        return [int(token) for token in text.replace(",", " ").split()]
    except ValueError as error:
        raise click.BadParameter(f"`{text}` is not a list of numbers.", param_hint="--token-ids") from error


def show(result: Any, json_to: str | None, *, quiet: bool, more: Iterable[str] = ()) -> None:
    """Print a result as a table, and what more there is to say; or as JSON, or write that.

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
    if not quiet:
        _print(printable("\n".join([result.table(), *more])))


def _print(text: str) -> None:
    try:
        click.echo(text)
    except OSError as error:
        # The interpreter would try once more to write the rest, and fail, when it ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"Standard output could not be written: {error.strerror or error}.") from error
