"""Adapters that cannot be resized, and what is told of them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import (
    AdapterError,
    resize,
)
from tests.make import models
from tests.make.adapters import Pixels, adapt, config_of

REFUSED = {
    "use_dora": (True, "sets `use_dora`: DoRA also rescales the base's weights"),
    "init_lora_weights": ("pissa_niter_4", "`init_lora_weights` to 'pissa_niter_4', which takes a part away"),
    "alora_invocation_tokens": ([1], "aLoRA is on for some tokens only"),
    "layer_replication": ([[0, 2]], "it repeats layers"),
    "a_key_of_tomorrow": (1, "sets `a_key_of_tomorrow`"),
    "peft_type": ("LOHA", "says `peft_type` 'LOHA'"),
    "r": (5, r"factors of shapes \[8, 48\] and \[32, 8\] for `model\.layers\.0\.mlp\.down_proj`, and not of rank 5"),
    "lora_alpha": (None, "is not a readable LoRA adapter"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_no_plain_delta_is_refused_with_the_reason(patterned, key):
    value, reason = REFUSED[key]
    config = config_of(patterned) | {key: value}
    (patterned / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=reason) as error:
        resize(patterned)
    assert str(patterned) in str(error.value)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_initial_weights_that_change_the_base_are_refused_as_peft_writes_them(tmp_path, start):
    with pytest.raises(AdapterError, match=f"`init_lora_weights` to '{start}'"):
        resize(adapt(models.llama(), tmp_path / "a", target_modules=["q_proj"], init_lora_weights=start))


def test_dora_groups_and_pickles_are_refused_as_peft_writes_them(tmp_path):
    with pytest.raises(AdapterError, match="DoRA"):
        resize(adapt(models.llama(), tmp_path / "dora", target_modules=["q_proj"], use_dora=True))
    with pytest.raises(AdapterError, match="a convolution in groups"):
        resize(adapt(Pixels(), tmp_path / "groups", r=4, target_modules=["third"]))
    adapt(models.llama(), tmp_path / "pickle", target_modules=["q_proj"])
    (tmp_path / "pickle" / "adapter_model.safetensors").rename(tmp_path / "pickle" / "adapter_model.bin")
    with pytest.raises(AdapterError, match="holds a pickle"):
        resize(tmp_path / "pickle")
    whole = adapt(Pixels(), tmp_path / "whole", r=4, target_modules=["first"], modules_to_save=["last"])
    with pytest.raises(
        AdapterError, match=r"holds `last\.(bias|weight)` whole: the portable form has no place for that"
    ):
        resize(whole, form="portable")


def test_values_that_are_not_finite_and_dtypes_that_are_too_small_are_told(patterned):
    weights = load_file(patterned / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    save_file(weights | {name: weights[name] * 1e13}, patterned / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"`model\.layers\.1\.mlp\.down_proj` overflow torch\.float16"):
        resize(patterned, dtype=torch.float16)
    weights[name][0, 0] = torch.inf
    save_file(weights, patterned / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"`model\.layers\.1\.mlp\.down_proj` cannot be resized.*NaN or infinity"):
        resize(patterned)


def test_a_number_that_json_has_no_word_for_is_not_written(patterned, tmp_path):
    config = config_of(patterned) | {"base_model_name_or_path": float("nan")}
    (patterned / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"`adapter_config\.json` would hold NaN or an infinity"):
        resize(patterned).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
