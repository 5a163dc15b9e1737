"""The rows of a table: each a model that answers the test questions, and a file of what it said."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from peft_posthoc import Prompts, extract, refine

from . import training
from .bases import base
from .kind import kind_of
from .settings import TASKS, Settings
from .task import Question, Sets, sample

Row = Callable[["Experiment"], tuple[Path | None, dict[str, Any]]]
"""The folder of an adapter, or of a whole model, or None for the base; and what is known of it."""


class Experiment:
    """Everything that rows share: made when it is first asked for, and kept in a work folder.

    Args:
        settings: Of the experiment.
        data: The task's local folder.
        work: Where what is made is kept.
        shared: Where a base is kept, for several seeds; `work` if None.
    """

    def __init__(self, settings: Settings, data: Path, work: Path, shared: Path | None = None) -> None:
        self.settings, self.data, self.work, self.shared = settings, data, work, shared or work
        self.task = TASKS[settings.task]()
        self.kind = kind_of(self.task.kind)

    @cached_property
    def base(self) -> str:
        """Where the base is."""
        return base(self.settings.model, self.data, self.shared)

    @cached_property
    def processor(self) -> Any:
        """The base's tokenizer, or what it reads images with."""
        return self.kind.processor(self.base)

    @cached_property
    def sets(self) -> Sets:
        """The questions that fit, as many as are asked for."""
        found = self.task.load(self.data)
        return Sets(self._fitting(found.train, self.settings.train), self._fitting(found.test, self.settings.test))

    def _fitting(self, questions: Sequence[Question], count: int | None) -> list[Question]:
        longest = self.settings.longest
        return sample([one for one in questions if self.kind.length(one, self.processor) <= longest], count)

    @cached_property
    def tuned(self) -> Path:
        """The full fine-tune."""
        folder = self.work / "full" / "tuned"
        if not (folder / "config.json").is_file():
            out = self.work / "full"
            training.full(self.kind, self.settings, self.base, self.sets.train, self.processor, out)
        return folder

    def extracted(self, rank: int) -> tuple[Path, dict[str, Any]]:
        """The adapter of the truncated SVD, and its E_r."""
        folder = self.work / f"svd-{rank}"
        if not folder.is_dir():
            extract(self.base, str(self.tuned), rank, out=folder).save(folder)
        totals = self._totals(rank)
        return folder, {"rank": rank, "energy": totals["energy"], "of all": totals["energy_of_all"]}

    def spectrum(self) -> dict[str, Any]:
        """The pair's energies, as far as the largest adapter that is there knows them."""
        rank = max(int(folder.name.removeprefix("svd-")) for folder in self.work.glob("svd-*"))
        totals = self._totals(rank)
        told = ("energy_of_all", "relative_delta", "extracted", "left_out")
        return {"energy at": totals["energy_at"] | {str(rank): totals["energy"]}} | {
            name: totals[name] for name in told
        }

    def _totals(self, rank: int) -> Any:
        file = self.work / f"svd-{rank}" / "phlora_report.json"
        return json.loads(file.read_text(encoding="utf-8"))["totals"]


def rows(settings: Settings) -> dict[str, Row]:
    """By name, in the order of the table."""
    rank, plus = settings.refined_rank, settings.lora_rank
    found: dict[str, Row] = {
        "base": lambda made: (None, {}),
        "full fine-tune": lambda made: (made.tuned, {}),
    }
    for each in sorted({*settings.ranks, rank}):
        found[f"PHLoRA r={each}"] = lambda made, each=each: made.extracted(each)  # type: ignore[misc]
    if kind_of(TASKS[settings.task].kind).refines:
        found[f"PHLoRA r={rank}, refined without data"] = lambda made: _refined(made, rank, 0)
        if settings.prompts:
            found[f"PHLoRA r={rank}, refined on {settings.prompts} prompts"] = lambda made: _refined(
                made, rank, settings.prompts
            )
    if settings.mergekit:
        found[f"mergekit-extract-lora r={rank}"] = lambda made: _mergekit(made, rank)
    for each in (rank,) if settings.zero_ranks is None else settings.zero_ranks:
        found[f"LoRA from zero r={each}"] = lambda made, each=each: _lora(made, each, plus=False)  # type: ignore[misc]
    if plus is not None:
        found[f"LoRA+ r={plus}"] = lambda made: _lora(made, plus, plus=True)
    return found


def measured(made: Experiment, name: str, row: Row) -> dict[str, Any]:
    """A row's file: scores and answers by question."""
    began = time.process_time()
    folder, facts = row(made)
    seconds = time.process_time() - began
    torch.manual_seed(made.settings.seed)
    if folder is not None and (folder / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(made.kind.load(made.base), folder)
        facts["bytes"] = (folder / "adapter_model.safetensors").stat().st_size
    else:
        model = made.kind.load(folder or made.base)
        facts["bytes"] = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
    settings, questions = made.settings, made.sets.test
    said = made.kind.said(model.to("cuda" if torch.cuda.is_available() else "cpu"), made.processor, questions, settings)
    scores = {one.id: dict(made.task.score(one, said[one.id])) for one in questions}
    return {
        "row": name,
        "settings": asdict(settings),
        **facts,
        "seconds": seconds,
        "questions": len(questions),
        "trained on": len(made.sets.train),
        "metrics": {metric: {key: one[metric] for key, one in scores.items()} for metric in made.task.metrics},
        "said": said,
        **where(),
    }


def where() -> dict[str, str]:
    """When and on what."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores ({_processor()}), torch {torch.__version__}",
    }


def _refined(made: Experiment, rank: int, prompts: int) -> tuple[Path, dict[str, Any]]:
    folder = made.work / f"refined-{rank}-{prompts}"
    start, facts = made.extracted(rank)
    if not folder.is_dir():
        texts = Prompts([one.prompt for one in sample(made.sets.train, prompts)]) if prompts else None
        more = {} if made.settings.refine_sequences is None else {"sequences": made.settings.refine_sequences}
        refine(start, made.base, str(made.tuned), texts=texts, seed=made.settings.seed, **more).save(folder)
    return folder, {"rank": rank, "of all": facts["of all"]}


def _lora(made: Experiment, rank: int, *, plus: bool) -> tuple[Path, dict[str, Any]]:
    out = made.work / ("lora-plus" if plus else f"lora-{rank}")
    if not (out / "adapter" / "adapter_config.json").is_file():
        training.lora(made.kind, made.settings, made.base, made.sets.train, made.processor, out, rank=rank, plus=plus)
    return out / "adapter", {"rank": rank}


def _mergekit(made: Experiment, rank: int) -> tuple[Path, dict[str, Any]]:
    out = made.work / f"mergekit-{rank}"
    if not out.is_dir():
        command = Path(sys.executable).with_name("mergekit-extract-lora")
        told = ["--model", made.tuned, "--base-model", made.base, "--out-path", out, "--max-rank", rank]
        subprocess.run([str(one) for one in (command, *told)], check=True, capture_output=True)
    return out, {"rank": rank}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
