"""Models that see: a question on an image, and an answer that is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from .settings import Settings
from .task import Question


class Images:
    """As a model's own processor puts an image and a text together."""

    refines = False  # It fits models that read text alone.
    # LLaVA's are saved under other names than the Trainer looks for, which goes on from the base without a word.
    resumes = False

    def load(self, folder: Path | str) -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)

    def processor(self, base: str) -> Any:
        found = AutoProcessor.from_pretrained(base, trust_remote_code=False)
        found.tokenizer.pad_token = found.tokenizer.pad_token or found.tokenizer.eos_token
        return found

    def length(self, question: Question, processor: Any) -> int:
        return len(processor.tokenizer(f"{question.prompt} {question.answer}").input_ids)

    def trainer(self, model: Any, arguments: dict[str, Any], questions: Sequence[Question], processor: Any) -> Trainer:
        return Trainer(
            model,
            TrainingArguments(**arguments, remove_unused_columns=False),
            train_dataset=list(questions),
            data_collator=lambda rows: taught(rows, processor),
        )

    @torch.inference_mode()
    def said(self, model: Any, processor: Any, questions: Sequence[Question], settings: Settings) -> Mapping[str, str]:
        model.eval()
        said = {}
        for start in tqdm(range(0, len(questions), settings.answer_batch), desc="answers", disable=None):
            part = questions[start : start + settings.answer_batch]
            inputs = _read(part, [turn(one, processor) for one in part], processor, "left").to(model.device)
            found = model.generate(**inputs, max_new_tokens=settings.answer_tokens, do_sample=False)
            for one, row in zip(part, found[:, inputs["input_ids"].shape[1] :], strict=True):
                said[one.id] = processor.tokenizer.decode(row, skip_special_tokens=True).strip()
        return said


def turn(question: Question, processor: Any) -> str:
    """What a model reads before it answers."""
    if processor.chat_template is None:
        return f"{processor.image_token} {question.prompt}"
    content = [{"type": "image"}, {"type": "text", "text": question.prompt}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def taught(questions: Sequence[Question], processor: Any) -> Any:
    """Questions with their answers. The loss is the answers'."""
    end = processor.tokenizer.eos_token
    answers = [f" {one.answer} {end}" for one in questions]
    texts = [turn(one, processor) + answer for one, answer in zip(questions, answers, strict=True)]
    found = _read(questions, texts, processor, "left")
    labels = torch.full_like(found["input_ids"], -100)
    for row, answer in enumerate(answers):
        length = len(processor.tokenizer(answer, add_special_tokens=False).input_ids)
        labels[row, -length:] = found["input_ids"][row, -length:]
    return {**found, "labels": labels}


def _read(questions: Sequence[Question], texts: Sequence[str], processor: Any, side: str) -> Any:
    images = [one.image if isinstance(one.image, Image.Image) else Image.open(one.image) for one in questions]
    return processor(
        text=list(texts),
        images=[image.convert("RGB") for image in images],
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )
