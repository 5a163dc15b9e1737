"""`phlora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from peft_posthoc.cli.command import Command
from peft_posthoc.cli.options import OUTPUT, TYPE, dtype_of
from peft_posthoc.cli.output import check_file, show
from peft_posthoc.errors import noting

IMAGES = ("diffusers", "comfyui", "kohya")
TO = ("gguf", "mlx", *IMAGES, "vllm-moe", "peft-moe", "merged")


@click.command(
    cls=Command,
    examples=[
        "export adapter adapter.gguf --to gguf --base base",
        "export adapter merged --to merged --base base",
    ],
)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(TO), required=True, help="What to write.")
@click.option("--base", metavar="BASE", help="The model it is for.  [default: what the adapter names]")
@click.option(
    "--with",
    "beside",
    multiple=True,
    metavar="[BASE+]ADAPTER",
    help="An adapter of another component of the same pipeline, into the same file.",
)
@click.option("--base-revision", metavar="REV", help="Branch, tag or commit, where BASE is a hub id.")
@click.option(
    "--dtype",
    type=TYPE,
    help="Type of what is written.  [default: the adapter's; merged: the base's]",
)
@click.option("--force", is_flag=True, help="Replace an earlier export that is at OUT; what else lies there stays.")
@OUTPUT
def export(
    adapter: Path,
    out: Path,
    dtype: str | None,
    quiet: bool,
    json_to: str | None,
    **options: Any,
) -> None:
    """Write ADAPTER, a PEFT LoRA folder or a LoRA file of an image model, as what other programs read into OUT.

    \b
    gguf      a file for llama.cpp and Ollama
    mlx       a folder for MLX-LM
    diffusers a folder, or NAME.safetensors, for `pipe.load_lora_weights`
    comfyui   NAME.safetensors for ComfyUI, norms and biases in it too
    kohya     NAME.safetensors for A1111, Forge, kohya's scripts
    vllm-moe  experts one by one, as vLLM and SGLang read them
    peft-moe  experts stacked, as PEFT computes with them
    merged    a full checkpoint of BASE + ADAPTER
    """  # noqa: D301  # click knows a paragraph of lines by the character `\b`.
    from peft_posthoc.formats.export import export as run

    # Bad arguments are told before the work, not after it.
    check_file(json_to, "--json")
    exported = run(adapter, out, dtype=dtype_of(dtype), progress=not quiet, **options)
    with noting(f"The export is at `{out}`."):
        show(exported, json_to, quiet=quiet, more=[f"Written to {out}"])
