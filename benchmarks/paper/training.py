"""Fine-tunes by transformers' Trainer: of all weights, with an adapter beside them, or of LoRA's factors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_callbacks import PosthocLoraCallback

from .settings import Settings
from .task import Question


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


def full(
    settings: Settings, base: str, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, out: Path
) -> Path:
    """Train all weights; the folder of the fine-tune. Interrupted, it goes on from its last epoch."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    trainer = _trainer(settings, settings.lr, model, questions, tokenizer, out)
    # A pretrained model that was loaded from a folder is named by it in its adapters.
    trainer.add_callback(PosthocLoraCallback(rank=settings.refined_rank, base=base))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out))
    trainer.save_model(out / "tuned")
    return out / "tuned"


def lora(
    settings: Settings,
    base: str,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    plus: bool,
) -> Path:
    """Train LoRA from zero on all linear layers, at the rank of the paper; the folder of the adapter.

    Args:
        settings: Of the experiment.
        base: Where the model is.
        questions: To train on.
        tokenizer: Of the model.
        out: A folder for the run.
        plus: With LoRA+'s optimizer (Hayou et al., 2024).
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    rank, alpha = settings.lora_rank, settings.lora_alpha if plus else settings.lora_rank
    torch.manual_seed(settings.seed)
    model = get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=settings.lora_dropout, target_modules="all-linear"),
    )
    trainer = _trainer(settings, settings.lora_lr, model, questions, tokenizer, out)
    if plus:
        trainer.optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=settings.lora_lr, loraplus_lr_ratio=settings.lora_ratio
        )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out))
    model.save_pretrained(out / "adapter")
    return out / "adapter"


def _trainer(
    settings: Settings, lr: float, model: Any, questions: Sequence[Question], tokenizer: Any, out: Path
) -> Trainer:
    out.mkdir(parents=True, exist_ok=True)
    steps = max(settings.batch // settings.micro_batch, 1)
    return Trainer(
        model,
        TrainingArguments(
            output_dir=str(out),
            per_device_train_batch_size=settings.micro_batch,
            gradient_accumulation_steps=steps,
            num_train_epochs=settings.epochs,
            learning_rate=lr,
            train_sampling_strategy="group_by_length",
            logging_steps=1,
            save_strategy="epoch",
            save_total_limit=1,
            seed=settings.seed,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=[tokens(question, tokenizer) for question in questions],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
    )
