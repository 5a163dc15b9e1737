"""Models with some weights as codes and scales: the others are worked on, and codes are never taken for numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from peft_posthoc import CheckpointError, extract, verify
from peft_posthoc.checkpoints.memory import InMemory
from peft_posthoc.checkpoints.quantized.undecoded import quantized
from tests.make import models

M, N = 48, 32


def codes(dtype, *shape):
    return torch.randint(0, 100, shape).to(dtype)


FORMATS = {
    "float8": lambda: {"weight": torch.randn(M, N).to(torch.float8_e4m3fn)},  # Without its scale.
    "GPTQ or AWQ": lambda: {
        "qweight": codes(torch.int32, N // 8, M),
        "qzeros": codes(torch.int32, 1, M // 8),
        "scales": torch.rand(1, M),
        "g_idx": torch.zeros(N, dtype=torch.int32),
    },
    "HQQ": lambda: {"W_q": codes(torch.uint8, M * N // 2, 1), "scale": torch.rand(M, 1), "zero": torch.rand(M, 1)},
}


def model(form, *, coded=("layers.0.mlp.proj",)):
    """A plain model, and the same with some of its layers as codes."""
    plain = {f"layers.{i}.{part}.proj.weight": torch.randn(M, N) for i in range(2) for part in ("attn", "mlp")}
    plain |= {name.replace("weight", "bias"): torch.randn(M) for name in plain}
    stored = {name: value for name, value in plain.items() if name.removesuffix(".weight") not in coded}
    stored |= {f"{module}.{leaf}": value for module in coded for leaf, value in FORMATS[form]().items()}
    return plain, stored


def changed(tensors):
    return {name: value + 0.01 * torch.randn(value.shape) for name, value in tensors.items()}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_what_is_stored_plainly_is_carried_and_the_rest_is_a_row(form, side):
    plain, stored = model(form)
    other = changed(plain)
    pair = (stored, other) if side == "base" else (other, stored)
    report = extract(*pair, 4).report
    parts = {row.weight: row for row in report.rows if row.cause == "of-quantized"}
    (weight,) = (row for row in report.rows if row.cause == "quantized")
    assert (weight.weight, weight.shape) == ("layers.0.mlp.proj.weight", (M, N))
    assert parts.keys() == stored.keys() - plain.keys()
    assert all(row.delta_norm is None and form.split(" in ")[0] in row.reason for row in (weight, *parts.values()))
    assert {row.weight for row in report.rows if row.status == "extracted"} == {
        "layers.0.attn.proj.weight",
        "layers.1.attn.proj.weight",
        "layers.1.mlp.proj.weight",
    }
    # It is one of four weights beside four biases.
    assert report.totals.unknown == pytest.approx(N / (4 * N + 4))
    assert weight.tuned_norm == (pytest.approx(float(other[weight.weight].norm())) if side == "base" else None)


@pytest.mark.parametrize("form", FORMATS)
def test_where_nothing_plain_is_left_the_model_is_refused_with_its_format(form):
    layers = [f"layers.{i}.{part}.proj" for i in range(2) for part in ("attn", "mlp")]
    plain, stored = model(form, coded=layers)
    with pytest.raises(CheckpointError, match=rf"The tuned `state dict` is quantised \(.*{form.split(' in ')[0]}"):
        extract(changed(plain), stored, 4)


@pytest.mark.parametrize("form", FORMATS)
def test_equal_codes_are_unchanged(form):
    _, stored = model(form)
    tuned = changed({name: value for name, value in stored.items() if "attn" in name and value.ndim == 2})
    statuses = {row.weight: row.status for row in extract(stored, stored | tuned, 4).report.rows}
    assert set(statuses.values()) == {"extracted", "unchanged"}
    assert {name for name, status in statuses.items() if status == "extracted"} == tuned.keys()


def test_a_layer_of_zeros_beside_others_has_the_weight_s_shape_and_not_that_of_its_codes():
    plain, stored = model("HQQ")
    found = extract(stored, changed(plain), 4)
    assert {name: slot[1:] for name, slot in found.plan.slots.items()} == dict.fromkeys(found.plan.slots, (M, N))


def test_masks_of_an_ordinary_model_are_no_codes():
    masks = {"h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8), "h.0.attn.weight": torch.randn(4, 4)}
    assert quantized(InMemory(masks, label="GPT-2")) == {}


def test_a_configuration_that_only_says_how_to_load_plain_weights_is_no_obstacle(tmp_path, llama_pair):
    base, tuned = map(Path, llama_pair)
    (tmp_path / "base").mkdir()
    config = json.loads((base / "config.json").read_text())
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    (tmp_path / "base" / "model.safetensors").symlink_to(base / "model.safetensors")
    factors = extract(base, tuned, 4).factors
    for module, (a, b) in extract(tmp_path / "base", tuned, 4).factors.items():
        assert torch.equal(a, factors[module][0])
        assert torch.equal(b, factors[module][1])


@pytest.fixture
def gpt_oss(tmp_path):
    """(plain base, the same with its experts in MXFP4, tuned)."""
    config = transformers.GptOssConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    base, tuned = map(Path, models.save_pair(transformers.GptOssForCausalLM(config).to(torch.bfloat16), tmp_path))
    coded = tmp_path / "coded"
    coded.mkdir()
    stored = {}
    for name, value in load_file(base / "model.safetensors").items():
        if value.ndim == 3:
            stored[f"{name}_blocks"] = codes(torch.uint8, 2, value.shape[2], 1, 16)
            stored[f"{name}_scales"] = codes(torch.uint8, 2, value.shape[2], 1)
        else:
            stored[name] = value
    save_file(stored, coded / "model.safetensors")
    said = json.loads((base / "config.json").read_text())
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (coded / "config.json").write_text(json.dumps({**said, "quantization_config": method}))
    return base, coded, tuned


@pytest.mark.parametrize("form", ["portable", "peft"])
def test_a_base_with_experts_in_mxfp4_is_what_transformers_decodes(form, gpt_oss, tmp_path):
    base, coded, tuned = gpt_oss
    decoded = tmp_path / "decoded"
    shutil.copytree(base, decoded)
    tensors = load_file(coded / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        tensors[name] = convert_moe_packed_tensors(tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, decoded / "model.safetensors")
    expected, found = (extract(one, tuned, 8, form=form) for one in (decoded, coded))
    assert any("experts" in module for module in expected.factors) == (form == "peft")
    assert found.factors.keys() == expected.factors.keys()
    for module, factors in expected.factors.items():
        assert all(map(torch.equal, found.factors[module], factors))


def test_an_adapter_of_quantized_weights_is_neither_compared_nor_added_to_codes(tmp_path):
    plain, stored = model("float8")
    adapter = extract(plain, changed(plain), 4).save(tmp_path / "adapter")
    for name, tensors in (("plain", plain), ("coded", stored)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"`layers\.0\.mlp\.proj\.weight`, which the adapter changes, is quantised"
    ):
        verify(adapter, tmp_path / "coded", changed(plain), outputs=False)
    with pytest.raises(
        CheckpointError, match=r"holds `layers\.0\.mlp\.proj\.weight` quantised \(float8\), and `.*` adds to it"
    ):
        extract(plain, f"{tmp_path / 'coded'}+{adapter}", 4)
