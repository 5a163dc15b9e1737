"""The tenants that are served: a base, a full fine-tune of it for each, and the adapter extracted from every one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from peft_posthoc import extract

# Of a weight's norm: so much that tenants answer differently, which shows that each was asked.
CHANGE = 0.3


class Shape(NamedTuple):
    """A Llama with heads of 128, and the rank of its adapters."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    rank: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        sizes = f"hidden {self.hidden}, intermediate {self.intermediate}, vocabulary {self.vocab}, {self.dtype}"
        return f"{self.layers} layers, {sizes}; adapters of rank {self.rank} on all linear layers"


def make(folder: Path, shape: Shape, count: int) -> None:
    """Write `base`, `tuned/0`, ... and `adapters/0`, ... into `folder`, those that are not there."""
    base = folder / "base"
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 128,
        num_key_value_heads=shape.hidden // 128,
        vocab_size=shape.vocab,
        max_position_embeddings=256,
        dtype=shape.dtype,
    )
    missing = [i for i in range(count) if not (folder / "adapters" / str(i)).is_dir()]
    if not missing:
        return
    disable_progress_bar()
    if not (base / "model.safetensors").is_file():
        torch.manual_seed(0)
        save(LlamaForCausalLM(config), base)
    for i in tqdm(missing, desc=f"Tenants of {folder.name}"):
        tuned = folder / "tuned" / str(i)
        save(fine_tune(LlamaForCausalLM.from_pretrained(base, trust_remote_code=False), shape.rank, seed=i), tuned)
        # `out` is moved into place when it is whole.
        extract(base, tuned, shape.rank, out=folder / "adapters" / str(i)).save(folder / "adapters" / str(i))


@torch.no_grad()
def fine_tune(model: LlamaForCausalLM, rank: int, *, seed: int) -> LlamaForCausalLM:
    """Every linear layer moves by a matrix of this rank: that is all of the fine-tune, but for rounding."""
    random = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "_proj" in name:
            m, n = weight.shape
            delta = torch.randn(m, rank, generator=random) @ torch.randn(rank, n, generator=random)
            weight += CHANGE * weight.float().norm() / delta.norm() * delta
    return model


def save(model: LlamaForCausalLM, folder: Path) -> None:
    model.to(model.config.dtype).save_pretrained(folder)
