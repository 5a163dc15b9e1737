"""Adapters on live models: refined in place, and everything else as it was found."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft_posthoc import AdapterError, MismatchError, distil, extract, refine
from peft_posthoc.refinement import distil as distil_module
from tests.make import models

QUICK: dict[str, Any] = {"sequences": 64, "length": 12, "method": distil(passes=4)}
CONFIG = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.5}


@pytest.fixture
def base() -> Any:
    return models.llama()


@pytest.fixture
def tuned(base: Any) -> Any:
    return models.tuned_from(base, scale=0.05)


def _adapted(base: Any, name: str = "default", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**CONFIG), adapter_name=name)
    model.add_adapter("other", peft.LoraConfig(**CONFIG))
    with torch.no_grad():
        for key, own in model.named_parameters():
            if "lora_" in key:
                own.data = own.normal_(std=0.05).to(dtype)
    return model


def _state(*models: nn.Module) -> Iterator[Any]:
    """All that a model is, but for what its factors are."""
    for model in models:
        for name, module in model.named_modules():
            kept = {key: value for key, value in vars(module).items() if key in ("training", "active_adapter")}
            yield name, kept, getattr(module, "active_adapters", None), getattr(module, "disable_adapters", None)
            yield list(module._forward_hooks), list(module._forward_pre_hooks)
        for name, own in model.named_parameters():
            grad = None if own.grad is None else own.grad.clone().tolist()
            yield name, own.requires_grad, own.dtype, own.device, own.data_ptr(), id(own), grad


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: own.detach().clone() for name, own in model.named_parameters()}


def _used(model: Any) -> None:
    """Bring a model into a state of its own: a gradient, a hook, half of it trained, another adapter active."""
    model.train()
    model.base_model.model.model.layers[0].eval()
    model.base_model.set_adapter(["other"])
    for own in list(model.parameters())[::3]:
        own.requires_grad_(True)
        own.grad = torch.ones_like(own)
    model.base_model.model.model.layers[1].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("name", ["default", "model"])  # One as a part of the model is called.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_live_adapter_is_refined_in_place(base: Any, tuned: Any, name: str, dtype: torch.dtype) -> None:
    model = _adapted(base, name, dtype)
    _used(model)
    tuned.train()
    wanted, before, teacher = list(_state(model, tuned)), _values(model), _values(tuned)
    refined = refine(model, tuned=tuned, adapter_name=name, **QUICK)
    assert not refined.kept
    assert list(_state(model, tuned)) == wanted
    now = _values(model)
    assert {key for key, x in before.items() if not torch.equal(x, now[key])} == {
        key for key in before if "lora_" in key and key.split(".")[-2] == name
    }
    assert all(torch.equal(x, teacher[key]) for key, x in _values(tuned).items())
    held = peft.get_peft_model_state_dict(model, adapter_name=name)
    assert held.keys() == refined.tensors.keys()
    assert all(torch.equal(x, refined.tensors[key]) for key, x in held.items())


def test_an_error_or_ctrl_c_leaves_a_live_model_as_it_was(
    base: Any, tuned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _adapted(base)
    _used(model)
    wanted, before = list(_state(model, tuned)), _values(model)
    real, calls = distil_module.divergence, []

    def fails(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 5:
            raise error
        return real(*args)

    for error in (MemoryError(), KeyboardInterrupt()):
        calls.clear()
        monkeypatch.setattr(distil_module, "divergence", fails)
        if isinstance(error, KeyboardInterrupt):
            assert refine(model, tuned=tuned, **QUICK).interrupted
        else:
            with pytest.raises(MemoryError):
                refine(model, tuned=tuned, **QUICK)
        assert list(_state(model, tuned)) == wanted
        assert all(torch.equal(x, before[key]) for key, x in _values(model).items() if ".default." not in key)
        if isinstance(error, MemoryError):
            assert all(torch.equal(x, before[key]) for key, x in _values(model).items())


def test_what_was_extracted_from_live_models_is_refined(base: Any, tuned: Any, tmp_path: Path) -> None:
    adapter = extract(base, tuned, 2, dtype=torch.float32)
    before = _values(base)
    refined = refine(adapter, base, tuned, **QUICK)
    assert not refined.kept
    assert not hasattr(base, "peft_config")
    assert all(torch.equal(x, before[key]) for key, x in _values(base).items())
    adapter.save(tmp_path / "svd")
    refined.save(tmp_path / "refined")
    kept = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("svd", "refined")]
    assert kept[0].keys() == kept[1].keys()
    folder = refine(tmp_path / "svd", base, tuned, **QUICK)
    assert all(torch.equal(x, refined.tensors[name]) for name, x in folder.tensors.items())


def test_what_cannot_be_refined_in_place_is_told(base: Any, tuned: Any) -> None:
    model = _adapted(base)
    with pytest.raises(AdapterError, match="no adapter `none`"):
        refine(model, tuned=tuned, adapter_name="none", **QUICK)
    with pytest.raises(AdapterError, match="holds no adapter"):
        refine(base, tuned=tuned, **QUICK)
    with pytest.raises(ValueError, match="holds its own"):
        refine(model, base, tuned, **QUICK)
    with pytest.raises(ValueError, match="tuned"):
        refine(model, **QUICK)
    with pytest.raises(MismatchError, match="LlamaForCausalLM and Qwen2ForCausalLM"):
        refine(model, tuned=models.qwen2(), **QUICK)
    with pytest.raises(MismatchError, match=r"knows 96 tokens, .* 104"):
        refine(model, tuned=models.llama(vocab_size=104), **QUICK)
    model.merge_adapter(["default"])
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        refine(model, tuned=tuned, **QUICK)
