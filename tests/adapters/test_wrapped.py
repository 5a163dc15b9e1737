"""A state dict of PEFT's wrapped model is read as what the model computes; PEFT's own merge is the answer."""

import copy

import peft
import pytest
import torch
from safetensors.torch import save_file

from peft_posthoc import AdapterError, CheckpointError, extract, open_checkpoint
from tests.make import models

CASES = {
    "plain": {},
    "scaled by rank and pattern": {
        "use_rslora": True,
        "alpha_pattern": {"v_proj": 3},
        "rank_pattern": {r"layers.1.self_attn.q_proj": 4},
    },
    "whole modules and embeddings": {
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["lm_head", "input_layernorm"],
    },
    "biases": {"lora_bias": True, "bias": "all"},
    "started from the base": {"init_lora_weights": "pissa"},
    "experts": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


def wrapped(model, *, adapter="default", **changes):
    settings = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **changes}
    found = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings), adapter_name=adapter)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) / 8
    return found


def save(found, folder, *, prefix=True, config=True, adapter="default"):
    folder.mkdir(exist_ok=True)
    cut = "" if prefix else "base_model.model."
    tensors = {name.removeprefix(cut): value.clone() for name, value in found.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    found.config.architectures = [type(found.get_base_model()).__name__]
    found.config.save_pretrained(folder)
    if config:
        found.peft_config[adapter].save_pretrained(folder)
    return folder


def model_for(case):
    if case == "experts":
        return models.mixtral()
    return models.qwen2(tie_word_embeddings=False) if case == "biases" else models.llama()


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_peft_merges_it_to(case, tmp_path):
    torch.manual_seed(1)
    found = wrapped(model_for(case), **CASES[case])
    opened = open_checkpoint(save(found, tmp_path / "wrapped", prefix=case != "plain"))
    merged = found.merge_and_unload().state_dict()
    assert opened.headers.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(opened.read(name).float(), value, atol=2e-6, rtol=1e-5)


def test_as_the_tuned_model_it_gives_its_factors_delta_and_no_other(tmp_path):
    base = models.llama()
    found = wrapped(base, adapter="mine")
    save(found, tmp_path / "wrapped", adapter="mine")
    got = extract(base, tmp_path / "wrapped" / "model.safetensors", 2)
    assert {row.weight for row in got.report.rows if row.status == "extracted"} == {
        f"model.layers.{layer}.self_attn.{leaf}_proj.weight" for layer in range(2) for leaf in "qv"
    }
    assert not got.report.totals.left_out
    merged = found.merge_and_unload().state_dict()
    for module, (a, b) in got.factors.items():
        change = merged[f"{module}.weight"] - base.state_dict()[f"{module}.weight"]
        torch.testing.assert_close(b @ a, change, atol=1e-5, rtol=1e-4)


def refused(folder, error, match):
    with pytest.raises(error, match=match):
        open_checkpoint(folder)


def test_without_a_scale_it_is_refused_in_one_line(tmp_path):
    save(wrapped(models.llama()), tmp_path / "wrapped", config=False)
    refused(tmp_path / "wrapped", CheckpointError, r"no adapter_config\.json beside it .* `merge_and_unload\(\)`")
    refused(wrapped(models.llama()).state_dict(), CheckpointError, r"`state dict` is a model as PEFT wraps it")


def test_of_several_adapters_none_is_chosen(tmp_path):
    found = wrapped(models.llama())
    found.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    refused(save(found, tmp_path / "wrapped"), CheckpointError, r"several adapters \(default, second\)")


def test_an_adapter_that_is_more_than_a_delta_is_refused(tmp_path):
    refused(save(wrapped(models.llama(), use_dora=True), tmp_path / "dora"), CheckpointError, "DoRA .*merge_and_unload")
    loha = peft.get_peft_model(models.llama(), peft.LoHaConfig(target_modules=["q_proj"]))
    refused(save(loha, tmp_path / "loha"), CheckpointError, "without LoRA factors")
    rows = wrapped(models.llama(), trainable_token_indices=[1, 2])
    refused(save(rows, tmp_path / "rows"), (CheckpointError, AdapterError), "trainable_token_indices|several adapters")
