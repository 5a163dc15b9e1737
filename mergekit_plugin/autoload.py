"""`phlora mergekit`: whether mergekit's own commands know `merge_method: phlora`.

mergekit looks for no plugins. What is written here are a `.pth` file, which Python runs when it starts, the `.start`
file that takes its place from Python 3.15 on (PEP 829), and the module that both name: `mergekit_plugin/hook.py`.
"""

from __future__ import annotations

import contextlib
import sysconfig
from pathlib import Path

import click

from peft_posthoc.errors import OutputError
from peft_posthoc.files import write_whole

MODULE = "phlora_mergekit_hook"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Let mergekit's own commands take `merge_method: phlora`, in this Python environment."""


@main.command()
def enable() -> None:
    """From now on `mergekit-yaml`, `-multi` and `-pytorch` know `phlora`."""
    new = [path for path in _files().values() if not path.exists()]
    try:
        for suffix, path in _files().items():
            write_whole(path, contents()[suffix])
    except OutputError as error:
        for path in new:
            with contextlib.suppress(OSError):
                path.unlink()
        raise OutputError(f"{error} `mergekit-phlora` needs nothing there.") from error
    click.echo(f"mergekit's commands take `merge_method: phlora` (by {MODULE}.pth in {_folder()}).")


@main.command()
def disable() -> None:
    """Take that back."""
    for path in reversed(_files().values()):
        path.unlink(missing_ok=True)
    click.echo("mergekit's commands are as they were.")


@main.command()
def status() -> None:
    """Tell which it is."""
    there = all(path.is_file() for path in _files().values())
    click.echo(f"{'enabled' if there else 'disabled'} in {_folder()}")


def contents() -> dict[str, str]:
    """Contents of the files, by the suffix of their names."""
    return {
        ".py": (Path(__file__).parent / "hook.py").read_text(encoding="utf-8"),
        ".pth": f"import {MODULE}; {MODULE}.install()\n",
        ".start": f"{MODULE}:install\n",
    }


def _folder() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _files() -> dict[str, Path]:
    # The module first: what names it comes when it is there.
    return {suffix: _folder() / f"{MODULE}{suffix}" for suffix in contents()}
