"""Quantized checkpoints as sources: the weights that codes stand for, and the step of their grid."""

import json

import pytest
import torch
from safetensors.torch import save_file

from peft_posthoc import CheckpointError, extract
from peft_posthoc.checkpoints.memory import InMemory
from peft_posthoc.sources import open_checkpoint
from tests.make import coded

E4M3 = torch.float8_e4m3fn


def quantised(weight, shape, largest=448.0):
    """8-bit floats of blocks that fill a grid of `shape`, and their scales."""
    rows, columns = (-(-m // k) for m, k in zip(weight.shape, shape, strict=True))
    scale = torch.empty(shape)
    codes = torch.empty(weight.shape, dtype=E4M3)
    for i in range(shape[0]):
        for j in range(shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight[at].abs().max() / largest
            codes[at] = (weight[at] / scale[i, j]).to(E4M3)
    return codes, scale


def by_hand(codes, scale, dtype=torch.bfloat16):
    rows, columns = (-(-m // k) for m, k in zip(codes.shape, scale.shape, strict=True))
    wanted = torch.empty(codes.shape)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            wanted[i, j] = float(codes[i, j]) * float(scale[i // rows, j // columns])
    return wanted.to(dtype)


@pytest.mark.parametrize("grid", [(1, 1), (10, 1), (3, 2), (10, 6)])
@pytest.mark.parametrize("leaf", ["weight_scale_inv", "weight_scale", "scale_weight"])
def test_eight_bit_floats_are_scaled_by_weight_row_or_block(grid, leaf):
    codes, scale = quantised(torch.randn(10, 6), grid)
    source = open_checkpoint({"layer.weight": codes, f"layer.{leaf}": scale, "layer.bias": torch.ones(10)})
    assert list(source.headers) == ["layer.bias", "layer.weight"]
    assert source.headers["layer.weight"].shape == (10, 6)
    assert torch.equal(source.read("layer.weight"), by_hand(codes, scale))


def test_the_step_is_to_the_next_float_of_the_grid():
    codes = torch.tensor([[1.0, 1.75, 2.0, 448.0, 0.0, -3.5]]).to(E4M3)
    source = open_checkpoint({"layer.weight": codes, "layer.weight_scale": torch.tensor([0.5])})
    assert source.steps("layer.weight").tolist() == [[2**-4, 2**-4, 2**-3, 16.0, 2**-10, 2**-3]]
    assert open_checkpoint({"a": torch.ones(2, 2)}).steps("a") is None


def test_a_scale_of_another_shape_is_refused():
    with pytest.raises(CheckpointError, match=r"`layer.weight_scale` is \(7,\).*rows or blocks"):
        open_checkpoint({"layer.weight": torch.ones(10, 6).to(E4M3), "layer.weight_scale": torch.ones(7)})


def test_a_planted_delta_on_a_quantised_base_is_found():
    codes, scale = quantised(torch.randn(48, 32), (1, 1))
    base = {"layer.weight": codes, "layer.weight_scale": scale}
    b, a = torch.randn(48, 2), torch.randn(2, 32)
    tuned = by_hand(codes, scale).float() + b @ a
    adapter = extract(InMemory(base, label="base"), {"layer.weight": tuned}, rank=2, dtype=torch.float32)
    ((_, factors, *_),) = adapter.layers.values()
    assert torch.allclose(factors.b @ factors.a, b @ a, atol=1e-4)


def test_scales_of_the_cache_are_no_weights():
    codes, scale = quantised(torch.randn(8, 8), (1, 1))
    stored = {"attn.k_proj.weight": codes, "attn.k_proj.weight_scale": scale}
    leaves = ["k_scale", "v_scale", "q_scale", "prob_output_scale", "k_proj.k_scale", "k_proj.output_scale"]
    base = stored | {f"attn.{leaf}": torch.ones(1) for leaf in leaves}
    assert list(open_checkpoint(base).headers) == ["attn.k_proj.weight"]


def _in_text(told):
    return "config.json", {"text_config": {"quantization_config": told, "torch_dtype": "float16"}}


def _older(told):
    return "config.json", {"compression_config": told, "torch_dtype": "float16"}


def _autogptq(told):
    return "quantize_config.json", {key: value for key, value in told.items() if key != "quant_method"}


def _autoawq(told):
    return "quant_config.json", {"w_bit": 4, "q_group_size": coded.GROUP, "version": "GEMM", "zero_point": True}


@pytest.mark.parametrize(
    ("scheme", "place"), [("gptq, 4 bits", _in_text), ("gptq, 4 bits", _autogptq), ("awq", _in_text), ("awq", _autoawq)]
)
def test_what_says_how_it_is_quantised_is_found_wherever_it_stands(scheme, place, tmp_path):
    told, layer = coded.BY_HAND[scheme]
    tensors, wanted = layer(torch.randn(16, 32))
    save_file({f"layer.{leaf}": value.contiguous() for leaf, value in tensors.items()}, tmp_path / "model.safetensors")
    name, says = place(told)
    (tmp_path / name).write_text(json.dumps(says))
    assert torch.equal(open_checkpoint(tmp_path).read("layer.weight"), wanted)


def _in_config(told):
    return "config.json", {"quantization_config": told, "torch_dtype": "float16"}


OTHER_NAMES = {
    "gptq, 4 bits": {"method": "gptq", "format": "gptq_v2", "bits": 4},
    "awq gemv": {"method": "awq", "format": "gemv", "bits": 4, "group_size": coded.GROUP},
    "gptq, 3 bits": {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 3},
    "awq": {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4},
}


@pytest.mark.parametrize("scheme", OTHER_NAMES)
def test_newer_and_other_names_of_a_form_are_known(scheme, tmp_path):
    """GPTQModel has `method` and `format` now; AutoRound packs as the others do."""
    tensors, wanted = coded.BY_HAND[scheme][1](torch.randn(16, 32))
    save_file({f"layer.{leaf}": value.contiguous() for leaf, value in tensors.items()}, tmp_path / "model.safetensors")
    name, says = _in_config(OTHER_NAMES[scheme])
    (tmp_path / name).write_text(json.dumps(says))
    assert torch.equal(open_checkpoint(tmp_path).read("layer.weight"), wanted)


@pytest.mark.parametrize(
    "said", [{"rotation": "hadamard"}, {"transform_config": {"config_groups": {"u": {}}}}], ids=str
)
def test_weights_that_were_rotated_are_refused(said):
    codes, scale = quantised(torch.randn(8, 8), (1, 1))
    base = InMemory({"layer.weight": codes, "layer.weight_scale": scale}, label="base")
    base.config = {"quantization_config": {"quant_method": "fp8", "transform_config": {"config_groups": {}}}}
    assert list(open_checkpoint(base).headers) == ["layer.weight"]
    base.config = {"quantization_config": {"quant_method": "fp8", **said}}
    with pytest.raises(CheckpointError, match=r"`base` holds weights that were rotated before they were quantised"):
        open_checkpoint(base)


@pytest.mark.parametrize("place", [_in_text, _older])
def test_the_size_of_blocks_and_the_type_are_found_wherever_they_stand(place, tmp_path):
    codes, scale = torch.randn(64, 64).to(E4M3), torch.rand(3, 4) + 0.1
    save_file({"layer.weight": codes, "layer.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    name, says = place({"quant_method": "fp8", "weight_block_size": [24, 20]})
    (tmp_path / name).write_text(json.dumps(says))
    each = scale.repeat_interleave(24, 0)[:64].repeat_interleave(20, 1)[:, :64]
    assert torch.equal(open_checkpoint(tmp_path).read("layer.weight"), (codes.float() * each).half())
