"""A pair in memory, and what adapters of it are judged by."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from demo_model import IGNORED
from rank_pairs import Pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_posthoc import Prompts, Sampled, extract
from peft_posthoc.running.live import says
from peft_posthoc.texts.distance import distances
from peft_posthoc.texts.texts import Texts
from peft_posthoc.texts.writers import Writers

GENERAL, SEED_OF_GENERAL = 32, 99
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Models:
    """A pair, its adapter of the truncated SVD, and the measures.

    Args:
        pair: Base, tuned model, and batches of the task that no model has seen.
        work: Where adapters are kept.
    """

    pair: Pair
    work: Path

    @property
    def name(self) -> str:
        """The pair as a file's name."""
        return f"{self.pair.title}-{self.pair.task}".replace(",", "").replace(" ", "-")

    def base(self) -> Any:
        """The base, anew."""
        return _load(self.pair.base)

    @cached_property
    def tuned(self) -> Any:
        """The tuned model."""
        return _load(self.pair.tuned)

    @cached_property
    def general(self) -> Sequence[Any]:
        """Text that the base wrote and nothing is fitted on."""
        tokenizer = AutoTokenizer.from_pretrained(self.pair.base, trust_remote_code=False)
        writers = Writers(self.base(), self.tuned, tokenizer, len(tokenizer))
        draw = random.Random(SEED_OF_GENERAL)
        with torch.random.fork_rng():
            torch.manual_seed(SEED_OF_GENERAL)
            return writers.general(writers.openings(GENERAL, draw), 128, None)

    def start(self, rank: int) -> Path:
        """The truncated SVD's adapter, of the linear layers and the head."""
        folder = self.work / "starts" / f"{self.name}-{rank}"
        if not folder.exists():
            extract(str(self.pair.base), str(self.pair.tuned), rank, head=True, dtype=torch.float32).save(folder)
        return folder

    def texts(self, prompts: int) -> Texts:
        """Text without data, or with so many prompts out of what the pair was tuned on."""
        return Prompts(self.pair.prompts[:prompts]) if prompts else Sampled()

    @torch.no_grad()
    def score(self, model: Any) -> dict[str, float]:
        """The loss of an answer's token, answers right in every token, and the distance on general text."""
        loss, tokens, right, answers = 0.0, 0, 0, 0
        for batch in self.pair.test:
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
            labels = batch.labels[:, 1:]
            asked = labels != IGNORED
            loss += torch.nn.functional.cross_entropy(logits[asked], labels[asked], reduction="sum").item()
            tokens += int(asked.sum())
            right += int(((logits.argmax(-1) == labels) | ~asked).all(1).sum())
            answers += len(labels)
        found = distances(says(model), says(self.tuned), self.general, size=16, device=CPU)
        return {"loss": loss / tokens, "exact": right / answers, "general": found["general"].kl}


def _load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval()
