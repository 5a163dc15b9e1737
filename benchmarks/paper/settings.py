"""One experiment: a model, a task, and how both are used. A JSON file each, beside this one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .easyvqa import EasyVQA
from .medmcqa import MedMCQA
from .mkfe import MKFE
from .msvd import MSVD
from .task import SEED, Task
from .tatqa import TatQA
from .tatqa_texts import TatQAPreferences, TatQARetrieval
from .vqarad import VQARad

TASKS: dict[str, type[Task]] = {
    "tatqa": TatQA,
    "mkfe": MKFE,
    "medmcqa": MedMCQA,
    "vqa-rad": VQARad,
    "msvd": MSVD,
    "tatqa-preferences": TatQAPreferences,
    "tatqa-retrieval": TatQARetrieval,
    "easy-vqa": EasyVQA,
}


@dataclass(frozen=True)
class Settings:
    """Of training the paper's (appendix B), where a file says nothing else."""

    model: str
    """A folder, a hub id, or one of `bases.py`: `smollm2`, `minilm`, `small-llava`."""
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
    lora_rank: int | None = 32
    """Of LoRA+, as in the paper; None for no row of it."""
    lora_alpha: int = 128
    lora_lr: float = 1e-5
    lora_ratio: float = 16.0
    lora_dropout: float = 0.01
    ranks: tuple[int, ...] = (32, 64, 512)
    refined_rank: int = 32
    """Of the adapters that stand beside each other at equal bytes: refined, mergekit's, LoRA from zero."""
    zero_ranks: tuple[int, ...] | None = None
    """Of LoRA from zero; that one if None."""
    prompts: int = 64
    """Unlabelled, of the training questions, for the refined adapter that has some; 0 for none."""
    refine_sequences: int | None = None
    layer_rank: int | None = None
    """At which each layer is tried alone, the others whole; None for no layer."""
    answer_batch: int = 16
    answer_tokens: int = 48
    mergekit: bool = True
    """Whether mergekit-extract-lora knows the model's architecture."""
    seed: int = SEED
    seeds: tuple[int, ...] | None = None
    """Train as often, each with its own seed; once, with `seed`, if None."""

    @classmethod
    def read(cls, file: Path) -> Self:
        """The settings of a file.

        Raises:
            TypeError: It has a name that is none.
        """
        told = json.loads(file.read_text(encoding="utf-8"))
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in told.items()})
