"""The pairs that are measured: checkpoints of real shapes, with the slowly decaying spectra of fine-tunes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

# The paper's fine-tunes keep about 40 % of the energy at rank 32, 75 % at rank 512: so does sigma_i ~ (i + 2)^-0.475.
DECAY = 0.475

SHAPES = {
    # 154M parameters: two layers of a 1B-class model.
    "llama-154m": {"hidden": 2048, "intermediate": 8192, "layers": 2, "vocab": 4864},
    # One layer of a 7B model.
    "llama-7b-layer": {"hidden": 4096, "intermediate": 14336, "layers": 1, "vocab": 512},
}


def make(folder: Path, *, hidden: int, intermediate: int, layers: int, vocab: int) -> tuple[Path, Path]:
    """Write `base` and `tuned` in bfloat16 into `folder`, unless they are there."""
    base, tuned = folder / "base", folder / "tuned"
    if (tuned / "model.safetensors").is_file():
        return base, tuned
    random = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    for i in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{i}.self_attn.{name}.weight"] = (hidden, hidden)
        for name, shape in (
            ("gate", (intermediate, hidden)),
            ("up", (intermediate, hidden)),
            ("down", (hidden, intermediate)),
        ):
            shapes[f"model.layers.{i}.mlp.{name}_proj.weight"] = shape
    before = {name: 0.02 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    norms = [f"model.layers.{i}.{name}_layernorm.weight" for i in range(layers) for name in ("input", "post_attention")]
    before |= {name: torch.ones(hidden) for name in [*norms, "model.norm.weight"]}
    before = {name: weight.bfloat16() for name, weight in before.items()}
    after = {
        name: (weight.float() + 0.03 * weight.float().norm() * fine_tune(weight.shape, random)).bfloat16()
        if "proj" in name
        else weight
        for name, weight in before.items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    for target, tensors in ((base, before), (tuned, after)):
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(config))
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return base, tuned


def fine_tune(shape: torch.Size, random: torch.Generator) -> torch.Tensor:
    """A matrix of norm 1 with exactly a power-law spectrum."""
    k, longer = min(shape), max(shape)
    spectrum = (torch.arange(k) + 2.0) ** -DECAY
    delta = (_basis(longer, k, random) * spectrum) @ _basis(k, k, random).T
    delta /= delta.norm()
    return delta if shape[0] == longer else delta.T


def _basis(n: int, k: int, random: torch.Generator) -> torch.Tensor:
    """`k` orthonormal vectors of `n` entries: of the discrete Hartley transform, with random signs and order.

    A random basis by QR would take minutes at these sizes.
    """
    order = torch.randperm(n, generator=random)[:k]
    angle = (torch.arange(n)[:, None] * order).remainder_(n) * (2 * torch.pi / n)
    signs = 2.0 * torch.randint(2, (n, 1), generator=random) - 1
    return signs * (angle.cos() + angle.sin()) / n**0.5
