"""A model's answers, by greedy generation in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from .task import Question
from .training import turn


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, questions: Sequence[Question], *, batch: int, most: int) -> dict[str, str]:
    """What the model says to each question, by the question's id: at most `most` tokens, from left-padded batches."""
    model.eval()
    said: dict[str, str] = {}
    order = sorted(questions, key=lambda question: len(question.prompt))  # alike in length, so that little is padding
    for start in tqdm(range(0, len(order), batch), desc="answers", disable=None):
        part = order[start : start + batch]
        texts = [turn(question.prompt, tokenizer) for question in part]
        inputs = tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=tokenizer.chat_template is None,
        ).to(model.device)
        found = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        for question, row in zip(part, found[:, inputs["input_ids"].shape[1] :], strict=True):
            said[question.id] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return said
