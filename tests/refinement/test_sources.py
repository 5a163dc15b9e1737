"""Whatever opens as a model is one to refine for: a base with an adapter on it, on either side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_posthoc import Given, PosthocError, blocks, compensated, distil, extract, refine
from tests.make import models

QUICK: dict[str, Any] = {"sequences": 24, "length": 10}
TEXTS: dict[str, Any] = {**QUICK, "texts": Given([[i, i + 1, 3, 5, 7, i] for i in range(21)])}
METHODS = [distil(passes=1), compensated(), blocks(passes=1)]


def _trained(base: str, folder: Path, **options: Any) -> Any:
    """An adapter of the base in a folder; and the model that it makes of it."""
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=4, **options))
    with torch.no_grad():
        for name, own in model.named_parameters():
            if "lora_" in name:
                own.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("method", METHODS, ids=lambda one: type(one).__name__)
@pytest.mark.filterwarnings("ignore")  # What PEFT says of tied heads.
def test_the_tuned_model_may_be_a_base_with_an_adapter(tmp_path: Path, method: Any) -> None:
    """One on the head alone of a tied model, which is tied no longer."""
    base, _ = models.save_pair(models.llama(tie_word_embeddings=True), tmp_path)
    wrapped = _trained(base, tmp_path / "lora", target_modules=["q_proj", "v_proj", "down_proj", "lm_head"]).eval()
    tuned = f"{base}+{tmp_path / 'lora'}"
    extract(base, tuned, 2, dtype=torch.float32).save(tmp_path / "svd")
    # PEFT's own merging would change what is tied with the head.
    live = refine(tmp_path / "svd", AutoModelForCausalLM.from_pretrained(base), wrapped, method=distil(), **TEXTS)
    refined = refine(tmp_path / "svd", base, tuned, method=method, **TEXTS)
    assert refined.after["task"].kl < refined.base["task"].kl
    assert refined.base["task"].kl == pytest.approx(live.base["task"].kl, rel=1e-4)


def test_the_base_may_be_one_too(llama_pair: tuple[str, str], tmp_path: Path) -> None:
    _trained(llama_pair[0], tmp_path / "lora", target_modules=["v_proj"])
    base = f"{llama_pair[0]}+{tmp_path / 'lora'}"
    extract(base, llama_pair[1], 2, dtype=torch.float32).save(tmp_path / "svd")
    for method in (distil(), compensated(), blocks()):
        refined = refine(tmp_path / "svd", base, llama_pair[1], method=method, sequences=96, length=10)
        assert not refined.kept


def test_live_models_with_an_adapter_on_them_are_told_what_to_do(llama_pair: tuple[str, str], tmp_path: Path) -> None:
    adapter = extract(*llama_pair, 2).save(tmp_path / "svd")
    base, tuned = map(models.load, llama_pair)
    wrapped = _trained(llama_pair[1], tmp_path / "lora", target_modules=["q_proj"])
    with pytest.raises(PosthocError, match=r"tuned model has an adapter on it\. Give what `merge_and_unload"):
        refine(adapter, base, wrapped, method=compensated(), **QUICK)
    with pytest.raises(PosthocError, match=r"The base, .*, has an adapter on it\. Give what `merge_and_unload"):
        refine(adapter, wrapped, tuned, **QUICK)
