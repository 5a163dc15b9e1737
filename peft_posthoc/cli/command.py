"""A command whose help has examples, and its options in groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from peft_posthoc.compute.own_process import import_torch

# Of options that several commands have; what is in none stands first.
_GROUPS = {
    "Ranks": "rank energy error budget params weighting max-rank min-rank round-to rank-pattern conv-rank min-energy",
    "What is carried": "include exclude embeddings head conv experts form for-base vocab with-tokenizer component",
    "Names": "map serve-as tuned-name",
    "Models": "base-revision tuned-revision device stream exact",
    "Refining": "refine prompts texts field prefix sequences length method passes lr bf16 damping shard minutes seed",
    "Output": "dry-run layers html plot quiet json debug help",
}
# Fewer are read at a glance.
_MANY = 12


class Command(click.Command):
    """One command.

    Args:
        examples: Command lines without `phlora`.
        **options: As click has them.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.examples = examples

    def invoke(self, ctx: click.Context) -> Any:
        """Do what is asked for. Help is not done here, and needs no tensors."""
        import_torch()
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, where they are many with a heading for each group."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Options", *_GROUPS)}
        options = [one for one in self.get_params(ctx) if isinstance(one, click.Option)]
        for one in options:
            name = one.opts[-1].lstrip("-")
            group = next((group for group, names in _GROUPS.items() if name in names.split()), "Options")
            if (record := one.get_help_record(ctx)) is not None:
                groups[group if len(options) > _MANY else "Options"].append(record)
        for group, records in groups.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        super().format_epilog(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}phlora {line}\n")
