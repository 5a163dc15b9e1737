"""Distillation a block at a time: nearer on unseen text, whatever is in memory, and never in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import RwkvConfig, RwkvForCausalLM

from peft_posthoc import PosthocError, blocks, compensated, refine
from peft_posthoc.refinement import blocks as module
from peft_posthoc.refinement.steps import Steps
from tests.make import models
from tests.refinement.test_compensated import SMALL, _adapter, _pair


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_fitted_adapter_is_nearer_on_text_it_has_not_seen(tmp_path: Path, name: str) -> None:
    pair = _pair(tmp_path, name)
    adapter = _adapter(pair, tmp_path / "svd", form="peft", experts="fused", head=True)
    refined = refine(adapter, *pair, method=blocks(), **SMALL)
    assert not refined.kept
    assert not refined.unmoved
    for kind in ("task", "general"):
        assert refined.after[kind].kl < refined.before[kind].kl
    before = load_file(adapter / "adapter_model.safetensors")
    # The experts too.
    assert {key for key, x in before.items() if torch.equal(x, refined.tensors[key])} == {
        key for key in before if ".lora_" not in key
    }


def test_factors_before_the_blocks_stay_and_are_told(tmp_path: Path) -> None:
    pair = _pair(tmp_path, "opt")
    refined = refine(_adapter(pair, tmp_path / "svd"), *pair, method=blocks(passes=0.5), **SMALL)
    assert refined.unmoved == {"model.decoder.project_in": "it comes before the blocks"}
    assert "1 module keeps its factors: it comes before the blocks." in refined.table()


class _Never:
    """Text that must not be written: what is wrong is told before."""

    def write(self, *_: Any, **__: Any) -> Any:
        raise AssertionError


@pytest.mark.parametrize("method", [blocks(), compensated()])
def test_a_model_that_is_no_chain_of_blocks_is_one_clear_line(tmp_path: Path, method: Any) -> None:
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, context_length=16)
    pair = models.save_pair(RwkvForCausalLM(config), tmp_path)
    writing = _Never()
    with pytest.raises(PosthocError, match=r"Rwkv.* do not run one after the other \(not enough .*; `distil`"):
        refine(_adapter(pair, tmp_path / "svd"), *pair, method=method, texts=writing, **SMALL)


def test_a_block_that_no_step_brings_nearer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = module._judged, list[None]()

    def judged(*args: Any) -> float:
        calls.append(None)
        return 1.0 if len(calls) > 2 else real(*args)

    monkeypatch.setattr(module, "_judged", judged)
    pair = _pair(tmp_path)
    refined = refine(_adapter(pair, tmp_path / "svd"), *pair, method=blocks(), **SMALL)
    assert not refined.kept
    assert {name.split(".")[2] for name in refined.unmoved} == {"1"}
    assert {*refined.unmoved.values()} == {"no step brought its block nearer"}


def test_steps_that_lead_away_are_not_kept(tmp_path: Path) -> None:
    pair = _pair(tmp_path)
    adapter = _adapter(pair, tmp_path / "svd")
    refined = refine(adapter, *pair, method=blocks(lr=50.0), **SMALL)
    assert refined.kept
    before = load_file(adapter / "adapter_model.safetensors")
    assert all(torch.equal(refined.tensors[key], x) for key, x in before.items())


def test_ctrl_c_keeps_the_blocks_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(Steps):
        made = 0

        def __init__(self, *args: Any) -> None:
            Stops.made += 1
            if Stops.made == 2:
                raise KeyboardInterrupt
            super().__init__(*args)

    monkeypatch.setattr(module, "Steps", Stops)
    pair = _pair(tmp_path)
    adapter = _adapter(pair, tmp_path / "svd")
    refined = refine(adapter, *pair, method=blocks(), **SMALL)
    assert refined.interrupted
    assert {name.split(".")[2] for name in refined.unmoved} == {"1"}
    before = load_file(adapter / "adapter_model.safetensors")
    assert {key.split(".")[4] for key, x in before.items() if not torch.equal(x, refined.tensors[key])} == {"0"}
