"""Fine-tunes by transformers' Trainer: of all weights, with an adapter beside them, or of LoRA's factors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_callbacks import PosthocLoraCallback

from .kind import Kind
from .settings import Settings
from .task import Question


def full(kind: Kind, settings: Settings, base: str, questions: Sequence[Question], processor: Any, out: Path) -> Path:
    """Train all weights; the folder of the fine-tune. Interrupted, it goes on from its last epoch."""
    trainer = _trainer(kind, settings, settings.lr, kind.load(base), questions, processor, out)
    # A pretrained model that was loaded from a folder is named by it in its adapters.
    apart = torch.cuda.is_available()  # On a CPU another process would only take what trains.
    trainer.add_callback(PosthocLoraCallback(rank=settings.refined_rank, base=base, background=apart))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out) if kind.resumes else None)
    trainer.save_model(out / "tuned")
    return out / "tuned"


def lora(
    kind: Kind,
    settings: Settings,
    base: str,
    questions: Sequence[Question],
    processor: Any,
    out: Path,
    *,
    rank: int,
    plus: bool,
) -> Path:
    """Train LoRA from zero on all linear layers; the folder of the adapter.

    Args:
        kind: Of the model.
        settings: Of the experiment.
        base: Where the model is.
        questions: To train on.
        processor: Of the model.
        out: A folder for the run.
        rank: Of the factors.
        plus: With LoRA+'s optimizer (Hayou et al., 2024), and its alpha.
    """
    alpha = settings.lora_alpha if plus else rank
    model = kind.load(base)
    torch.manual_seed(settings.seed)
    model = get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=settings.lora_dropout, target_modules="all-linear"),
    )
    trainer = _trainer(kind, settings, settings.lora_lr, model, questions, processor, out)
    if plus:
        trainer.optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=settings.lora_lr, loraplus_lr_ratio=settings.lora_ratio
        )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out))
    model.save_pretrained(out / "adapter")
    return out / "adapter"


def _trainer(
    kind: Kind, settings: Settings, lr: float, model: Any, questions: Sequence[Question], processor: Any, out: Path
) -> Trainer:
    out.mkdir(parents=True, exist_ok=True)
    arguments = {
        "output_dir": str(out),
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": max(settings.batch // settings.micro_batch, 1),
        "num_train_epochs": settings.epochs,
        "learning_rate": lr,
        "logging_steps": 1,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "seed": settings.seed,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return kind.trainer(model, arguments, questions, processor)
