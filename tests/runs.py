"""Tiny training runs with the real Trainer."""

import torch
import transformers

STEPS = 6


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
