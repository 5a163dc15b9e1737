"""Models that answer: trained on right answers, judged on what they generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from .settings import Settings
from .task import Question


class Answers:
    """Greedy generation in batches."""

    refines = True
    resumes = True

    def load(self, folder: Path | str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)

    def processor(self, base: str) -> Any:
        """The base's tokenizer, with a token to pad with."""
        found = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        found.pad_token = found.pad_token or found.eos_token
        return found

    def length(self, question: Question, processor: Any) -> int:
        return len(tokens(question, processor)["input_ids"])

    def trainer(self, model: Any, arguments: dict[str, Any], questions: Sequence[Question], processor: Any) -> Trainer:
        return Trainer(
            model,
            TrainingArguments(**arguments, train_sampling_strategy="group_by_length"),
            train_dataset=[tokens(question, processor) for question in questions],
            data_collator=DataCollatorForSeq2Seq(processor, model),
        )

    @torch.inference_mode()
    def said(self, model: Any, processor: Any, questions: Sequence[Question], settings: Settings) -> Mapping[str, str]:
        """What the model says to each question, from left-padded batches."""
        said: dict[str, str] = {}
        order = sorted(questions, key=lambda question: len(question.prompt))  # alike in length: little is padding
        for start in tqdm(range(0, len(order), settings.answer_batch), desc="answers", disable=None):
            part = order[start : start + settings.answer_batch]
            inputs = processor(
                [turn(question.prompt, processor) for question in part],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=processor.chat_template is None,
            ).to(model.device)
            found = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=settings.answer_tokens,
                do_sample=False,
                pad_token_id=processor.pad_token_id,
            )
            for question, row in zip(part, found[:, inputs["input_ids"].shape[1] :], strict=True):
                said[question.id] = processor.decode(row, skip_special_tokens=True).strip()
        return said


def turn(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a model reads before it answers."""
    if tokenizer.chat_template is None:
        return f"{prompt}\n"
    said = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))


def tokens(question: Question, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """A turn with its answer. The loss is the answer's."""
    before = tokenizer(turn(question.prompt, tokenizer), add_special_tokens=tokenizer.chat_template is None).input_ids
    answer = [*tokenizer(question.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return {"input_ids": before + answer, "labels": [-100] * len(before) + answer}
