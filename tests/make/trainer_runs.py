"""Tiny training runs with the real Trainer."""

import logging
import os
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from hf_callbacks import PosthocLoraCallback

STEPS = 6
WEIGHTS = "adapter_model.safetensors"


def examples(count=32):
    random = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 96, (count, 16), generator=random)
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, **changes):
    return transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "save_steps": 2,
            "logging_steps": 2,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
    )


def trainer(model, folder, *callbacks, **changes):
    """A Trainer of a model, or of a folder's model, that is ready to train."""
    if not isinstance(model, torch.nn.Module):
        model = transformers.AutoModelForCausalLM.from_pretrained(model)
    return transformers.Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=examples(),
        eval_dataset=examples(8),
        callbacks=list(callbacks),
    )


def here(**options):
    """A callback that works in this process, and whose failures fail the test."""
    return PosthocLoraCallback(**{"rank": 8, "background": False, "strict": True, **options})


def adapters(folder):
    return sorted(path.parent.name for path in Path(folder).glob(f"*/{WEIGHTS}"))


def same_factors(one, two):
    ours, theirs = (load_file(Path(folder) / WEIGHTS) for folder in (one, two))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def extractions():
    """The processes that this one has started to make adapters."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(child) for child in children if b"hf_callbacks.child" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(process):
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}


class Where(logging.Handler):
    """Remembers what the callback logs."""

    def __init__(self):
        super().__init__()
        self.lines = []
        logger = logging.getLogger("hf_callbacks")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record):
        self.lines.append(record.getMessage())

    def of(self, *words):
        return [line for line in self.lines if all(word in line for word in words)]
