"""Two processes' ZeRO checkpoints, each beside what it has to hold: `-m tests.make.zero_run FOLDER` under torchrun."""

import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from tests.make import models

# Name: stage, dtype of the model, the changes of its configuration, whether its embeddings are frozen.
SETUPS = {
    "zero1": (1, "bf16", {}, False),
    "zero2": (2, None, {}, True),
    "zero2-tied": (2, "bf16", {"tie_word_embeddings": True}, False),
    "zero3": (3, None, {}, False),
    "zero3-tied": (3, "bf16", {"tie_word_embeddings": True}, True),
}


def train(stage, dtype, changes, frozen):
    """An engine after two steps, of a model whose odd sizes no number of processes divides."""
    torch.manual_seed(0)
    model = models.llama(vocab_size=97, intermediate_size=49, **changes)
    model.model.embed_tokens.weight.requires_grad_(not frozen)
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in moving if parameter.ndim > 1]},
        {"params": [parameter for parameter in moving if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        **({dtype: {"enabled": True}} if dtype else {}),
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    ids = torch.randint(97, (1, 16))
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    return engine, model


def held(parameter):
    """What the optimizer holds of it, or the model where nothing moves it."""
    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter).clone()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.clone()


def main(folder):
    for name, (stage, dtype, changes, frozen) in SETUPS.items():
        engine, model = train(stage, dtype, changes, frozen)
        engine.save_checkpoint(f"{folder}/{name}")
        weights = {name: held(parameter) for name, parameter in model.named_parameters()}
        if torch.distributed.get_rank() == 0:
            save_file(weights, Path(folder) / f"{name}.safetensors")
            model.config.save_pretrained(f"{folder}/{name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
