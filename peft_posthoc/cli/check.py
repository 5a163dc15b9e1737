"""`phlora check`."""

from __future__ import annotations

from pathlib import Path

import click

from peft_posthoc.cli.command import Command
from peft_posthoc.cli.options import OUTPUT, TYPE, dtype_of
from peft_posthoc.cli.output import check_file, show
from peft_posthoc.errors import PosthocError, noting

# As in `ENGINES` and `IMAGE_ENGINES`, which a test holds against this: importing them for `phlora --help` would take
# a second.
NAMES = (
    "peft",
    "vllm",
    "sglang",
    "lorax",
    "tgi",
    "trtllm",
    "nim",
    "llamacpp",
    "mlx",
    "diffusers",
    "comfyui",
    "a1111",
    "all",
)


@click.command(
    cls=Command,
    examples=[
        "check adapter --base Qwen/Qwen2.5-7B",
        "check adapter --engine vllm --fix adapter-for-vllm",
    ],
)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--engine",
    "engines",
    type=click.Choice(NAMES),
    multiple=True,
    help="An engine; may be given more than once.  [default: all, of text or of images]",
)
@click.option("--base", metavar="BASE", help="Folder of the model to be served: names and shapes are compared with it.")
@click.option(
    "--fix",
    "out",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Write the adapter here as all engines read it.",
)
@click.option(
    "--dtype",
    type=TYPE,
    help="Type of the factors in OUT.  [default: ADAPTER's]",
)
@click.option("--force", is_flag=True, help="Replace an adapter that is at OUT; what else lies there stays.")
@OUTPUT
def check(
    adapter: Path,
    engines: tuple[str, ...],
    base: str | None,
    out: Path | None,
    dtype: str | None,
    force: bool,
    quiet: bool,
    json_to: str | None,
) -> None:
    """Tell what serving engines would do with the LoRA adapter in the folder or file ADAPTER, whoever made it.

    Reads its configuration and the headers of its tensors only. The exit status is 1 if an engine would refuse it or
    compute something else than PEFT; with --fix, if it would do so with OUT. Without --engine, those that load no base
    in BASE's format are not counted.
    """
    check_file(json_to, "--json")
    names = engines or ("all",)
    if out is None:
        if dtype is not None or force:
            raise click.UsageError("--dtype and --force are for --fix.")
        from peft_posthoc.serving.check import check as run

        found = run(adapter, engines=names, base=base)
        show(found, json_to, quiet=quiet)
    else:
        from peft_posthoc.serving.fix import fix

        fixed = fix(adapter, out, base=base, engines=names, dtype=dtype_of(dtype), force=force, progress=not quiet)
        with noting(f"The adapter is at `{out}`."):
            show(fixed, json_to, quiet=quiet, more=[f"Adapter written to {out}"])
        found = fixed.check
    if found.wrong:
        still = "" if out is None else " still"
        raise PosthocError(f"`{found.adapter}` would{still} be refused or silently wrong in {', '.join(found.wrong)}.")
