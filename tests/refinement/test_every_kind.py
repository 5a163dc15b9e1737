"""Adapters of every kind that the project writes or reads: refined within their own file layout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from peft_posthoc import distil, extract, refine
from tests.make import models

MAKES: dict[str, Any] = {
    "gpt2": models.gpt2,  # Conv1D; embeddings tied to the head
    "llama": models.llama,
    "tied": lambda: models.llama(tie_word_embeddings=True),
    "qwen2": models.qwen2,  # biases
    "mixtral": models.mixtral,  # experts as PEFT's target_parameters
    "laguna": models.laguna,  # PEFT renames what it loads
}
QUICK: dict[str, Any] = {"sequences": 64, "length": 12, "method": distil(lr=0.05)}


@pytest.fixture(scope="module", params=MAKES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    torch.manual_seed(0)
    found: tuple[str, str] = models.save_pair(
        MAKES[request.param](), tmp_path_factory.mktemp(request.param), scale=0.05
    )
    return found


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore")  # What PEFT says of tied heads and of biases.
@pytest.mark.parametrize("options", [{"form": "portable"}, {"form": "portable", "embeddings": True}, {"form": "peft"}])
def test_factors_move_and_nothing_else(pair: tuple[str, str], tmp_path: Path, options: dict[str, Any]) -> None:
    extract(*pair, 0.2, dtype=torch.float32, **options).save(tmp_path / "svd")
    refined = refine(tmp_path / "svd", *pair, **QUICK)
    refined.save(tmp_path / "refined")
    before, after = _tensors(tmp_path / "svd"), _tensors(tmp_path / "refined")
    assert {name: (x.shape, x.dtype) for name, x in before.items()} == {
        name: (x.shape, x.dtype) for name, x in after.items()
    }
    moved = {name for name, x in before.items() if not torch.equal(x, after[name])}
    factors = {name for name, x in before.items() if ".lora_" in name and not name.endswith(".bias") and x.any()}
    assert not refined.kept
    assert moved == factors
    for kind in ("task", "general"):
        assert refined.after[kind].kl < refined.before[kind].kl


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_peft_are_refined_too(tmp_path: Path) -> None:
    """Trained by PEFT: rank and scale patterns, rsLoRA, a module kept whole, and names that PEFT did not choose."""
    base = models.llama()
    pair = models.save_pair(base, tmp_path, scale=0.05)
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"down_proj": 5},
        modules_to_save=["lm_head"],
        use_rslora=True,
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, own in model.named_parameters():
            if "lora_" in name:
                own.normal_(std=0.05)
    model.save_pretrained(tmp_path / "own")
    refined = refine(tmp_path / "own", *pair, **QUICK)
    before = _tensors(tmp_path / "own")
    assert not refined.kept
    for name, x in before.items():
        assert torch.equal(x, refined.tensors[name]) == (".lora_" not in name)
