"""What an extraction found: the factors of every carried weight, and an account of everything else."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.adapters.push import CanPush
from peft_posthoc.adapters.writer import Contents, write_folder
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import NothingToCarryError
from peft_posthoc.extraction.findings import Findings
from peft_posthoc.extraction.forms.layout import Form
from peft_posthoc.extraction.outcomes import Kept, Layer, Outcome, Skipped
from peft_posthoc.extraction.plan import Plan
from peft_posthoc.extraction.reasons import LeftOut
from peft_posthoc.extraction.report import Report
from peft_posthoc.extraction.sizing import FoundSizing
from peft_posthoc.extraction.spool import finished_layers
from peft_posthoc.pairing.difference import Difference
from peft_posthoc.ranks.rules import Allocation, Rank, as_rule, describe
from peft_posthoc.text import as_html, counted


@dataclass(frozen=True, repr=False)
class Adapter(Findings, CanPush):
    """The factors of every carried weight, and an account of everything else."""

    @classmethod
    def of(
        cls,
        base: Checkpoint,
        tuned: Checkpoint,
        plan: Plan,
        outcomes: Iterable[Outcome],
        *,
        tuned_name: str | None = None,
        dtype: torch.dtype,
        options: Mapping[str, Any],
        form: Form = "portable",
        notes: Sequence[str] = (),
        differences: Sequence[Difference] = (),
        beside: Mapping[str, Path] | None = None,
        served: Checkpoint | None = None,
    ) -> Adapter:
        """Put together what the loop found.

        Raises:
            NothingToCarryError: No layer was factored, and nothing else is kept.
        """
        order = {name: index for index, name in enumerate(plan.headers)}
        rows = sorted(outcomes, key=lambda row: order[row.weight])
        layers = {row.weight: row for row in rows if isinstance(row, Layer)}
        skipped = {row.weight: row for row in rows if isinstance(row, Skipped)}
        kept = {row.weight: row for row in rows if isinstance(row, Kept)}
        if not layers and (form == "portable" or not any(row.delta_norm for row in kept.values())):
            raise NothingToCarryError(_nothing([*skipped.values(), *kept.values()], plan, base.label, tuned.label))
        return cls(
            layers=layers,
            skipped=skipped,
            kept=kept,
            plan=plan,
            form=form,
            notes=tuple(notes),
            differences=tuple(differences),
            beside=beside or {},
            dtype=dtype,
            provenance={
                "base": base.label,
                "base_revision": base.revision,
                "tuned": tuned_name or tuned.label,
                "tuned_revision": tuned.revision,
                **({} if served is None else {"for_base": served.label, "for_base_revision": served.revision}),
                **_quantised(plan, base=base, tuned=tuned, for_base=served),
                "layout": plan.layout.origin,
                "options": dict(options),
                "versions": {
                    "peft-posthoc": metadata.version("peft-posthoc"),
                    "python": platform.python_version(),
                    "safetensors": metadata.version("safetensors"),
                    "torch": torch.__version__,
                },
            },
        )

    def __repr__(self) -> str:
        return f"<Adapter of {self.provenance['tuned']}: {self.report.summary()[0].removesuffix('.')}>"

    def _repr_html_(self) -> str:
        return as_html(self.report.table())

    def at(self, rank: Rank) -> Adapter:
        """The same adapter at lower ranks: its leading triplets, by another rule. Nothing is factored again.

        Args:
            rank: As `extract` takes it.

        Raises:
            ValueError: The rule asks for more than this adapter holds.
        """
        rule = as_rule(rank)
        if isinstance(rule, Allocation):
            return self.cut(rule.choose(FoundSizing(self, describe(rule))), describe(rule))
        ranks = {name: rule(spectrum) for name, spectrum in self.spectra.items()}
        for name, asked in ranks.items():
            layer = self.layers[name]
            if asked > (held := len(layer.factors.s)):
                if getattr(rule, "measures_noise", False) and layer.signal is not None and layer.signal <= held:
                    ranks[name] = held  # What stands out is all there; what followed it is not.
                    continue
                raise ValueError(f"{describe(rule)} asks for more than rank {held}, which the adapter has of `{name}`.")
        return self.cut(ranks, describe(rule))

    @cached_property
    def report(self) -> Report:
        """What is carried and how well, what is left out, why, and how large that is."""
        return Report.of(self)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the adapter's file, by name.

        Raises:
            AdapterError: The factors were not kept, or the saved type does not hold one.
        """
        return self.file.filled(self.factors, {name: kept.value for name, kept in self.kept.items()})

    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the adapter folder: all of it, or nothing.

        Args:
            folder: A folder that does not exist yet, or is empty.
            force: Replace an adapter that is there. What else lies in its folder stays.

        Raises:
            AdapterError: The folder holds something, or cannot be written; or there are no factors.
        """
        place = Path(folder).absolute()
        with finished_layers(place, {place: self.provenance}):
            config = self.file.config(self.provenance)
            contents = Contents(self.tensors(), config, self.report.to_dict(), self.provenance, self.beside)
            write_folder(place, contents, force=force, called=folder)
        return Path(folder)


def _quantised(plan: Plan, **sides: Checkpoint | None) -> dict[str, Any]:
    """The formats that carried weights are quantised in, by side; nothing where none is."""
    forms = {
        role: sorted({form for name in plan.carried if (form := side.coded_as(name))})
        for role, side in sides.items()
        if side is not None
    }
    return {"quantised": {role: own for role, own in forms.items() if own}} if any(forms.values()) else {}


def _nothing(others: Iterable[Skipped | Kept], plan: Plan, base: str, tuned: str) -> str:
    changed = [row for row in others if row.delta_norm]
    if not changed:
        return f"`{base}` and `{tuned}` hold the same weights: there is nothing to extract."
    worst = max(changed, key=lambda row: row.delta_norm or 0.0)
    fate = plan.fates[worst.weight]
    why = fate.hint if isinstance(fate, LeftOut) else "PEFT keeps it only beside a layer with factors"
    number = counted(len(changed), "other does", "others do")
    return (
        f"No weight that is carried differs between `{base}` and `{tuned}`. {number}; the largest "
        f"change is in `{worst.weight}`: {why}."
    )
