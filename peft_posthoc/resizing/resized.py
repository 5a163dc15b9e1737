"""The result of resizing: the smaller factors, and their layout in a file."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import eq
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import cast_biases
from peft_posthoc.adapters.config import adapter_config
from peft_posthoc.adapters.factors import Factors
from peft_posthoc.adapters.module import Module
from peft_posthoc.adapters.named_base import same_base
from peft_posthoc.adapters.names import PREFIX, patterns
from peft_posthoc.adapters.push import CanPush
from peft_posthoc.adapters.writer import Contents, write_folder
from peft_posthoc.linalg.lowrank import LowRank
from peft_posthoc.models.layout import is_of_an_expert
from peft_posthoc.ranks.safe import safe_rank
from peft_posthoc.resizing.report import ResizeReport, Row, Totals
from peft_posthoc.text import as_flag


class Cut(NamedTuple):
    """The part of one module that is kept."""

    module: Module
    parts: list[LowRank]
    """The factors of each of its deltas, in the saved dtype."""
    bias: Tensor | None
    """The sum for the module's bias, in float64."""
    rank_before: int
    """Pairs in the input, padding included."""
    true_rank: int
    """Singular values that are not zero; of stacked experts the most that one has."""
    bytes_before: int
    seconds: float

    @property
    def rank(self) -> int:
        """How many pairs are kept; one, of zeros, of a zero delta."""
        return max(len(part.s) for part in self.parts)

    @property
    def norm(self) -> float:
        """Norm of all its deltas together."""
        return math.hypot(*(part.norm for part in self.parts))

    @property
    def energy(self) -> float | None:
        """Share of the energy of its deltas that is kept; None if they are zero."""
        kept = sum(part.energy * part.norm**2 for part in self.parts)
        return min(kept / self.norm**2, 1.0) if self.norm else None


@dataclass(frozen=True)
class Resized(CanPush):
    """The factors of every module at their new ranks, and what is carried along with them."""

    cuts: tuple[Cut, ...]
    whole: Mapping[str, Tensor]
    """Tensors that take the place of the base's, by the file's names."""
    configs: tuple[Mapping[str, Any], ...]
    """The configurations of the adapters it was made from."""
    form: Literal["portable", "peft"]
    dtype: torch.dtype
    bytes_before: int
    provenance: Mapping[str, Any]
    """The adapters, their weights, the options, library versions."""

    @cached_property
    def rank(self) -> int:
        """The file's `r`."""
        if self.form == "portable":
            return safe_rank(max(cut.rank for cut in self.cuts))
        # Experts have one rank, and it is the file's: which parameter a stack in it belongs to is not said there, so no
        # pattern can name it; and what transformers stacks when it loads must be of one rank.
        experts = [cut.rank for cut in self.cuts if _of_experts(cut.module)]
        counts = Counter(cut.rank for cut in self.cuts)
        return max(experts) if experts else max(counts, key=lambda rank: (counts[rank], rank))

    def tensors(self) -> dict[str, Tensor]:
        """The file's tensors."""
        tensors: dict[str, Tensor] = {}
        biases = {cut.module.name: cut.bias for cut in self.cuts if cut.bias is not None}
        saved = cast_biases(biases, self.dtype)
        for cut in self.cuts:
            rank = self._file_rank(cut)
            tensors |= cut.module.join([Factors(part.a, part.b).padded(rank) for part in cut.parts])
            if self._lora_bias:
                zeros = torch.zeros(cut.module.size[0], dtype=self.dtype)
                tensors[f"{PREFIX}{cut.module.name}.lora_B.bias"] = saved.get(cut.module.name, zeros)
        return {**tensors, **self.whole}

    def config(self) -> dict[str, Any]:
        """The file's configuration."""
        first = self.configs[0]
        of_peft = self.form == "peft"
        ranks = {cut.module.name: self._file_rank(cut) for cut in self.cuts}
        others = {module: rank for module, rank in ranks.items() if rank != self.rank}
        return adapter_config(
            self.rank,
            self._target_modules(),
            base=first.get("base_model_name_or_path"),
            revision=first.get("revision"),
            task_type=next((own for one in self.configs if (own := one.get("task_type"))), None),
            auto_mapping=first.get("auto_mapping"),
            fan_in_fan_out=any(one.get("fan_in_fan_out") for one in self.configs),
            bias=next((own for one in self.configs if (own := one.get("bias", "none")) != "none"), "none"),
            whole=self._union("modules_to_save"),
            stacked=self._union("target_parameters"),
            ranks=patterns(others, ranks) if of_peft else None,
            lora_bias=self._lora_bias if of_peft else None,
        )

    @cached_property
    def report(self) -> ResizeReport:
        """The account: a row for each module, and the totals."""
        rows = tuple(self._row(cut) for cut in self.cuts)
        total = sum(cut.norm**2 for cut in self.cuts)
        energy = min(sum((cut.energy or 0.0) * cut.norm**2 for cut in self.cuts) / total, 1.0)
        totals = Totals(
            energy=energy,
            relative_error=math.sqrt(max(0.0, 1 - energy)),
            rank=max(row.rank for row in rows),
            file_rank=self.rank,
            modules=len(rows),
            zero=sum(row.delta_norm == 0 for row in rows),
            whole=len(self.whole),
            bytes_before=self.bytes_before,
            bytes=sum(row.bytes for row in rows) + sum(tensor.nbytes for tensor in self.whole.values()),
            seconds=sum(row.seconds for row in rows),
        )
        return ResizeReport(rows, totals, tuple(self._warnings()), self.provenance)

    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the adapter folder: all of it, or nothing.

        Args:
            folder: A folder that does not exist yet, or is empty.
            force: Replace an adapter that is there.

        Raises:
            AdapterError: The folder holds something, or cannot be written.
        """
        place = Path(folder).absolute()
        contents = Contents(self.tensors(), self.config(), self.report.to_dict(), self.provenance)
        write_folder(place, contents, force=force, called=folder)
        return Path(folder)

    @cached_property
    def _lora_bias(self) -> bool:
        return any(cut.bias is not None for cut in self.cuts)

    def _file_rank(self, cut: Cut) -> int:
        return self.rank if self.form == "portable" or _of_experts(cut.module) else cut.rank

    def _row(self, cut: Cut) -> Row:
        module, energy = cut.module, cut.energy
        m, n = module.size
        pairs = self._file_rank(cut) * module.experts * (m + n) + (m if self._lora_bias else 0)
        return Row(
            module=module.name,
            kind=module.kind,
            shape=(m, n),
            deltas=module.experts,
            rank_before=cut.rank_before,
            true_rank=cut.true_rank,
            rank=cut.rank if cut.true_rank else 0,
            energy=energy,
            relative_error=None if energy is None else math.sqrt(max(0.0, 1 - energy)),
            delta_norm=cut.norm,
            bytes_before=cut.bytes_before,
            bytes=pairs * self.dtype.itemsize,
            seconds=cut.seconds,
        )

    def _warnings(self) -> list[str]:
        found = []
        whole = all(cut.rank >= cut.true_rank for cut in self.cuts)
        if len(self.configs) == 1 and whole and self.rank >= max(cut.rank_before for cut in self.cuts):
            found.append("Nothing is cut: no module's rank was above what was asked for.")
        if self.form == "peft":
            found.append(
                "The `peft` form is for PEFT alone: serving engines refuse or misread it "
                f"(`{as_flag('form', 'portable')}`)."
            )
        elif any(cut.module.kind == "experts" for cut in self.cuts):
            found.append("Stacked experts (`target_parameters`) need PEFT 0.19, and an engine that takes them so.")
        for key, what in (("base_model_name_or_path", "base"), ("task_type", "task")):
            told = list(dict.fromkeys(str(one[key]) for one in self.configs if one.get(key)))
            same = same_base if what == "base" else eq
            if not all(same(told[0], other) for other in told[1:]):
                found.append(f"The adapters name different {what}s: {', '.join(told)}. The first one is written.")
        return found

    def _union(self, key: str) -> list[str]:
        return sorted({str(one) for config in self.configs for one in config.get(key) or ()})

    def _target_modules(self) -> list[str]:
        """The inputs' own lists; the modules' full names where an input says it in another way."""
        filters = ("exclude_modules", "layers_to_transform", "layers_pattern")
        lists = all(
            isinstance(one.get("target_modules") or [], list) and not any(one.get(key) is not None for key in filters)
            for one in self.configs
        )
        return (
            self._union("target_modules")
            if lists
            else sorted(c.module.name for c in self.cuts if c.module.kind != "experts")
        )


def _of_experts(module: Module) -> bool:
    return module.kind == "experts" or is_of_an_expert(module.name)
