"""The `phlora` command."""

from __future__ import annotations

import importlib
import os
from difflib import get_close_matches
from importlib import metadata
from typing import Any

import click

from peft_posthoc.cli.output import one_line_errors
from peft_posthoc.models.remote_code import no_prompts

# Packages beside this one add commands to `phlora` by entry points of this group.
COMMANDS = "peft_posthoc.commands"
# Each command's file is loaded when it is called for.
_FILES = {
    "check": "check",
    "combine": "resize",
    "export": "export",
    "extract": "extract",
    "inspect": "inspect",
    "push": "push",
    "refine": "refine",
    "resize": "resize",
    "verify": "verify",
    "whose": "whose",
}


class _Command(click.Group):
    """Turns errors into one line on stderr, and Ctrl-C into the usual exit status."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # `--json BASE TUNED`: click would take BASE for the file.
        following = [*args, ""][1:]
        bare = [one == "--json" and not _is_file(after) for one, after in zip(args, following, strict=True)]
        return super().parse_args(ctx, ["--json=-" if alone else one for one, alone in zip(args, bare, strict=True)])

    # Here and not in `main`: there click has already turned Ctrl-C into its own message and a status of 1.
    def invoke(self, ctx: click.Context) -> Any:
        if "--quiet" in ctx.args:
            # Read by the hub's client when it is first imported.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with one_line_errors("phlora", debug="--debug" in ctx.args, mistyped=2), no_prompts():
            return super().invoke(ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = get_close_matches(args[0], self.list_commands(ctx), 1)
        if near and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"No such command '{args[0]}'. Did you mean `phlora {near[0]}`?")
        return super().resolve_command(ctx, args)

    # Click cuts what does not fit into one line.
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(limit=1000)) for name, one in commands if one])

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_FILES, *metadata.entry_points(group=COMMANDS).names])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in _FILES:
            found: click.Command = getattr(importlib.import_module(f"peft_posthoc.cli.{_FILES[name]}"), name)
            return found
        own = super().get_command(ctx, name)
        added = () if own else metadata.entry_points(group=COMMANDS, name=name)
        return next((point.load() for point in added), own)


def _is_file(argument: str) -> bool:
    """Whether what follows `--json` is the file to write: a name that ends so, a device, or `-`."""
    return argument == "-" or argument.endswith(".json") or argument.startswith("/dev/")


@click.group(cls=_Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="peft-posthoc", prog_name="phlora")
def main() -> None:
    """Post-hoc LoRA: a portable adapter from a base model and a full fine-tune of it.

    BASE and TUNED are model folders (safetensors or .bin, single or sharded), single files or hub ids (org/name),
    or a model with a LoRA adapter on it (MODEL+ADAPTER).
    """
