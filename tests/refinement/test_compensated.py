"""The closed form: each layer fitted to what the tuned layer gives, on what the adapted model lets it read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from peft_posthoc import compensated, extract, refine

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}
WINDOW: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA)),
    # Blocks that give tuples, Conv1D, learned positions.
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=32)),
    # Two masks and two rotary tables.
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**LLAMA, **WINDOW)),
    # Projections before and behind the blocks.
    "opt": (OPTForCausalLM, OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16, init_std=0.3)),
    # Experts, which are not fitted.
    "mixtral": (MixtralForCausalLM, MixtralConfig(**LLAMA, num_local_experts=2)),
}
SMALL: dict[str, Any] = {"sequences": 128, "length": 16}


def _pair(folder: Path, name: str = "llama") -> tuple[Path, Path]:
    """A base, and one that every matrix but the embeddings of was moved."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    model = cls(config)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1 and not any(part in key for part in ("embed", "wte", "wpe")):
                weight += 0.4 * weight.std() * torch.randn_like(weight)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def _adapter(pair: tuple[Path, Path], out: Path, **options: Any) -> Path:
    extract(*pair, **{"rank": 2, "dtype": torch.float32, **options}).save(out)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_a_fitted_adapter_is_nearer_on_text_it_has_not_seen(tmp_path: Path, name: str) -> None:
    pair = _pair(tmp_path, name)
    adapter = _adapter(pair, tmp_path / "svd", form="peft", experts="fused")
    refined = refine(adapter, *pair, method=compensated(), **SMALL)
    assert not refined.kept
    for kind in ("task", "general"):
        assert refined.after[kind].kl < refined.before[kind].kl
    before = load_file(adapter / "adapter_model.safetensors")
    moved = {key for key, x in before.items() if not torch.equal(x, refined.tensors[key])}
    left = {key for key in before if any(f"{name}." in key for name in refined.unmoved) or ".lora_" not in key}
    assert moved == before.keys() - left
    assert refined.steps == len(moved) / 2
