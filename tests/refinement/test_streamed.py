"""A block of each model at a time: the same numbers as with both in memory, and nothing left behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_posthoc import CheckpointError, Given, PosthocError, Refined, compensated, refine
from peft_posthoc.linalg.regression import regress
from peft_posthoc.refinement import compensated as module
from peft_posthoc.refinement.walk import Walk
from tests.refinement.test_compensated import SMALL, _adapter, _pair


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(place))
    return place


def _alive(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _products(refined: Refined) -> dict[str, torch.Tensor]:
    """What the factors of each linear layer make together."""
    factors = {key: x.double() for key, x in refined.tensors.items() if ".lora_" in key and "experts" not in key}
    return {key: factors[key.replace("lora_A", "lora_B")] @ a for key, a in factors.items() if "lora_A" in key}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_block_at_a_time_gives_what_whole_models_give(tmp_path: Path, place: Path, name: str) -> None:
    pair = _pair(tmp_path, name)
    adapter = _adapter(pair, tmp_path / "svd", form="peft", experts="fused", embeddings=True, head=True)
    # The first three tokens of each text are fixed, and count in neither.
    ids = torch.randint(48, (SMALL["sequences"], SMALL["length"]), generator=torch.Generator().manual_seed(0))
    ids[:, :3] = torch.tensor([1, 2, 3])
    texts = Given(ids.tolist())
    streamed = refine(adapter, *pair, texts=texts, method=compensated(), **SMALL)
    whole = refine(adapter, *map(_alive, pair), texts=texts, method=compensated(), **SMALL)
    assert whole.after["task"].tokens % (SMALL["length"] - 2) == 0
    assert streamed.unmoved == whole.unmoved
    for one, other in ((streamed.base, whole.base), (streamed.before, whole.before), (streamed.after, whole.after)):
        for kind, distance in one.items():
            assert distance.tokens == other[kind].tokens
            assert distance.kl == pytest.approx(other[kind].kl, rel=1e-3)
    for key, product in _products(whole).items():
        torch.testing.assert_close(_products(streamed)[key], product, rtol=1e-3, atol=1e-4)
    assert not list(place.iterdir())


def test_ctrl_c_keeps_what_is_fitted_by_then(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def regress_and_stop(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return regress(*args)

    monkeypatch.setattr(module, "regress", regress_and_stop)
    pair = _pair(tmp_path)
    refined = refine(_adapter(pair, tmp_path / "svd"), *pair, method=compensated(), **SMALL)
    assert refined.interrupted
    assert not refined.kept
    assert len(refined.unmoved) == 7
    assert not list(place.iterdir())


def test_an_error_leaves_no_files_behind(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "regress", fail)
    pair = _pair(tmp_path)
    with pytest.raises(OSError, match="space"):
        refine(_adapter(pair, tmp_path / "svd"), *pair, method=compensated(), **SMALL)
    assert not list(place.iterdir())


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Walk, "_file", lambda *_: Path("/dev/full"))
    pair = _pair(tmp_path)
    with pytest.raises(PosthocError, match="Set TMPDIR"):
        refine(_adapter(pair, tmp_path / "svd"), *pair, method=compensated(), **SMALL)


def test_weights_that_are_not_there_are_told(tmp_path: Path) -> None:
    pair = _pair(tmp_path)
    adapter, file = _adapter(pair, tmp_path / "svd"), pair[1] / "model.safetensors"
    stored = load_file(file)
    del stored["model.layers.1.self_attn.q_proj.weight"]
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights .*: model.layers.1.self_attn.q_proj.weight"):
        refine(adapter, *pair, method=compensated(), **SMALL)
