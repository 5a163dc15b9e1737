"""Models that prefer: trained by DPO (Rafailov et al., 2024), judged by how much likelier a right answer is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from .answering import Answers, tokens, turn
from .settings import Settings
from .task import Question


class Preferences(Answers):
    """TRL's trainer, whose reference is the model that it starts from."""

    def length(self, question: Question, processor: Any) -> int:
        both = (question, question._replace(answer=question.gold["wrong"]))
        return max(len(tokens(one, processor)["input_ids"]) for one in both)

    def trainer(self, model: Any, arguments: dict[str, Any], questions: Sequence[Question], processor: Any) -> Trainer:
        rows = [
            {"prompt": turn(one.prompt, processor), "chosen": one.answer, "rejected": one.gold["wrong"]}
            for one in questions
        ]
        return DPOTrainer(
            model=model,
            # TRL's defaults are for large models on GPUs.
            args=DPOConfig(
                **arguments, bf16=torch.cuda.is_available(), activation_checkpointing=False, max_length=None
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=processor,
        )

    @torch.inference_mode()
    def said(self, model: Any, processor: Any, questions: Sequence[Question], settings: Settings) -> Mapping[str, str]:
        """Log p of the right answer less that of the wrong one."""
        model.eval()
        said = {}
        for one in tqdm(questions, desc="preferences", disable=None):
            right, wrong = (
                _likelihood(model, tokens(one._replace(answer=answer), processor))
                for answer in (one.answer, one.gold["wrong"])
            )
            said[one.id] = str(right - wrong)
        return said


def _likelihood(model: Any, row: Mapping[str, Sequence[int]]) -> float:
    """Log p of what is labelled, in nats."""
    ids, labels = (torch.tensor([row[name]], device=model.device) for name in ("input_ids", "labels"))
    start = int((labels[0] != -100).nonzero()[0])
    logits = model(input_ids=ids, logits_to_keep=ids.shape[1] - start + 1).logits[0, :-1]
    return -float(cross_entropy(logits.double(), labels[0, start:], reduction="sum"))
