"""What to extract, the same for every checkpoint of a run: here, or as the command that another process runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from peft_posthoc.extraction.extract import extract
from peft_posthoc.extraction.prepare import experts_of, form_of, vocab_of
from peft_posthoc.ranks.rules import Rank, Told, as_rule, several


@dataclass(frozen=True)
class Extraction:
    """The options of `peft_posthoc.extract`.

    Raises:
        ValueError: The rank is none, or the form.
    """

    rank: Rank = 32
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embeddings: bool = False
    head: bool = False
    exact: bool = False
    device: str = "cpu"
    dtype: torch.dtype | None = None
    form: str = "portable"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    conv: bool = False
    experts: str | None = None
    vocab: str = "error"
    rename: tuple[str, ...] = ()
    serve_as: str | None = None

    def __post_init__(self) -> None:
        if isinstance(as_rule(self.rank), several):
            raise ValueError("One adapter is made of every checkpoint, at one rank. Several are given.")
        form_of(self.form)
        experts_of(self.experts, self.form)
        vocab_of(self.vocab, self.form)

    def flags(self) -> list[str]:
        """The options of `phlora extract` that say the same.

        Raises:
            ValueError: The rank rule is a function, which cannot be said on a command line.
        """
        rule = as_rule(self.rank)
        try:
            flags = rule.flags() if isinstance(rule, Told) else None
        except ValueError:
            flags = None
        if flags is None:
            raise ValueError(
                f"The rank rule {rule!r} cannot be handed to another process. Extract in this one: `background=False`."
            )
        if self.rank_pattern:
            flags += ["--rank-pattern", json.dumps(dict(self.rank_pattern))]
        flags += [f"--{name}" for name in ("embeddings", "head", "conv", "exact") if getattr(self, name)]
        flags += [f"--include={pattern}" for pattern in self.include]
        flags += [f"--exclude={pattern}" for pattern in self.exclude]
        flags += [f"--map={rule}" for rule in self.rename]
        for option, value in (("--experts", self.experts), ("--serve-as", self.serve_as)):
            if value is not None:
                flags += [option, value]
        if self.dtype is not None:
            flags += ["--dtype", str(self.dtype).removeprefix("torch.")]
        return [*flags, "--device", self.device, "--form", self.form, "--vocab", self.vocab]

    def known_flags(self) -> list[str] | None:
        """The same; None where the rank rule is a function."""
        try:
            return self.flags()
        except ValueError:
            return None

    def run(
        self,
        base: str,
        tuned: Path | nn.Module,
        out: Path,
        *,
        base_revision: str | None = None,
        tuned_name: str | None = None,
        progress: bool = False,
    ) -> None:
        """Extract in this process and write the adapter."""
        adapter = extract(
            base,
            tuned,
            self.rank,
            base_revision=base_revision,
            tuned_name=tuned_name,
            include=self.include,
            exclude=self.exclude,
            embeddings=self.embeddings,
            head=self.head,
            exact=self.exact,
            device=self.device,
            dtype=self.dtype,
            form=self.form,
            rank_pattern=self.rank_pattern,
            conv=self.conv,
            experts=self.experts,
            vocab=self.vocab,
            rename=self.rename,
            serve_as=self.serve_as,
            progress=progress,
        )
        adapter.save(out, force=True)
