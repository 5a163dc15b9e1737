"""Quantized checkpoints by the libraries whose formats they are in: the same weights, to the last bit where told."""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from peft_posthoc import CheckpointError, extract
from peft_posthoc.sources import open_checkpoint

GROUPS = {
    "pack-quantized": [
        {"num_bits": 4, "strategy": "group", "group_size": 16},
        {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
        {"num_bits": 8, "strategy": "channel"},
        {"num_bits": 3, "strategy": "channel"},
        {"num_bits": 4, "strategy": "tensor"},
    ],
    "int-quantized": [
        {"num_bits": 8, "strategy": "channel"},
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ],
    "float-quantized": [
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 8]},
    ],
    "nvfp4-pack-quantized": [{"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}],
    "mxfp4-pack-quantized": [
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    ],
}
CASES = [(form, told) for form, group in GROUPS.items() for told in group]


def compressed(form, told, weight):
    """A layer as compressed-tensors stores it, and what it makes of that."""
    args = QuantizationArgs(**{"type": "int", "symmetric": True, **told})
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    columns = weight.shape[1]
    if told["strategy"] == "block":
        blocks = weight.unflatten(1, (-1, 8)).unflatten(0, (-1, 16))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        size = told.get("group_size", columns)
        groups = weight.reshape(1, -1) if told["strategy"] == "tensor" else weight.unflatten(1, (-1, size))
        low, high = groups.amin(-1), groups.amax(-1)
    over = {}
    if form == "nvfp4-pack-quantized":
        over = {"weight_global_scale": (448 * 6 / weight.abs().max()).float().reshape(1)}
    scale, zero = calculate_qparams(low, high, args, global_scale=over.get("weight_global_scale"))
    state = {"weight": weight, "weight_scale": scale, **over}
    if not args.symmetric:
        state["weight_zero_point"] = zero.to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    wanted = compressor.decompress(dict(stored), scheme)["weight"]
    return {name: value.contiguous() for name, value in stored.items() if value is not None}, wanted


def folder_of(path, tensors, told, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": told, **config}))
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors")
    return path


def config_of(form, *groups):
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": dict(enumerate(groups))}


@pytest.mark.parametrize(("form", "told"), CASES, ids=str)
def test_compressed_tensors(form, told, tmp_path):
    stored, wanted = compressed(form, told, torch.randn(32, 64).bfloat16())
    layer = {f"up.{name}": value for name, value in stored.items()} | {"up.bias": torch.ones(32)}
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **told}}
    source = open_checkpoint(folder_of(tmp_path / "model", layer, config_of(form, group)))
    assert set(source.headers) == {"up.weight", "up.bias"}
    assert source.headers["up.weight"] == ((32, 64), torch.bfloat16)
    read = source.read("up.weight")
    if form in ("nvfp4-pack-quantized", "int-quantized", "float-quantized"):
        # There the library rounds the scale, or what it has before scaling, to bfloat16; here all is rounded once.
        assert torch.allclose(read.float(), wanted.float(), rtol=2**-6)
    else:
        assert torch.equal(read, wanted)
    assert source.coded_as("up.weight").startswith("compressed-tensors, ")
    assert (source.steps("up.weight") > 0).all()


def test_rows_that_fill_no_word_and_groups_by_name(tmp_path):
    """A group that names the layer goes before one of its class; `down` is four bits, every other one eight."""
    four, wanted = compressed("pack-quantized", {"num_bits": 4, "strategy": "channel"}, torch.randn(5, 45).bfloat16())
    eight, other = compressed("pack-quantized", {"num_bits": 8, "strategy": "channel"}, torch.randn(5, 45).bfloat16())
    tensors = {f"mlp.down.{name}": value for name, value in four.items()}
    tensors |= {f"mlp.up.{name}": value for name, value in eight.items()}
    args = {"type": "int", "symmetric": True, "strategy": "channel"}
    groups = [
        {"targets": ["Linear"], "weights": {"num_bits": 8, **args}},
        {"targets": ["re:.*down"], "weights": {"num_bits": 4, **args}},
    ]
    source = open_checkpoint(folder_of(tmp_path / "model", tensors, config_of("pack-quantized", *groups)))
    assert torch.equal(source.read("mlp.down.weight"), wanted)
    assert torch.equal(source.read("mlp.up.weight"), other)


def test_experts_of_gpt_oss_are_what_transformers_makes_of_them():
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 132, (3, 8, 2), dtype=torch.uint8)
    source = open_checkpoint({"experts.up_blocks": blocks, "experts.up_scales": scales})
    assert list(source.headers) == ["experts.up"]
    assert source.headers["experts.up"].shape == (3, 64, 8)
    assert torch.equal(source.read("experts.up"), convert_moe_packed_tensors(blocks, scales))


def test_experts_of_deepseek_in_four_bits_are_what_transformers_makes_of_them(tmp_path):
    codes = torch.randint(-128, 128, (6, 32), dtype=torch.int8)
    scale = torch.randint(120, 132, (6, 2), dtype=torch.uint8)
    tensors = {"expert.weight": codes, "expert.weight_scale_inv": scale}
    source = open_checkpoint(folder_of(tmp_path / "model", tensors, {"quant_method": "fp8"}))
    wanted = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    assert torch.equal(source.read("expert.weight"), wanted)


@pytest.mark.parametrize("exponents", [False, True])
def test_blocks_of_eight_bit_floats_are_what_transformers_makes_of_them(exponents):
    codes = torch.randn(16, 24).to(torch.float8_e4m3fn)
    scale = torch.randint(120, 132, (2, 3), dtype=torch.uint8) if exponents else torch.rand(2, 3)
    source = open_checkpoint({"layer.weight": codes, "layer.weight_scale_inv": scale})
    assert torch.equal(source.read("layer.weight"), Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16))


def test_modelopt_multiplies_by_the_second_scale_where_compressed_tensors_divides():
    """By hand: the low half of 0x2B is -1.5, the high half 1; the block's scale 2, the weight's 0.25."""
    layer = {"weight_scale": torch.tensor([[2.0]]).to(torch.float8_e4m3fn)}
    codes = torch.full((1, 8), 0x2B, dtype=torch.uint8)
    wanted = torch.tensor([[-0.75, 0.5] * 8])
    modelopt = {"weight": codes, "weight_scale_2": torch.tensor(0.25), "input_scale": torch.tensor(1.0), **layer}
    packed = {"weight_packed": codes, "weight_global_scale": torch.tensor([4.0]), **layer}
    for own in (modelopt, packed):
        source = open_checkpoint({f"up.{name}": value for name, value in own.items()})
        assert list(source.headers) == ["up.weight"]
        assert torch.equal(source.read("up.weight").float(), wanted)
        assert torch.equal(source.steps("up.weight")[0, :2], torch.tensor([0.25, 0.25]))


def test_scales_in_another_shard_and_plain_layers_beside(tmp_path):
    codes, plain = torch.randn(8, 4).to(torch.float8_e4m3fn), torch.randn(8, 4)
    (tmp_path / "model").mkdir()
    save_file({"a.weight": codes, "b.weight": plain}, tmp_path / "model/model-00001-of-00002.safetensors")
    save_file({"a.weight_scale": torch.tensor(0.5)}, tmp_path / "model/model-00002-of-00002.safetensors")
    files = {"a.weight": 1, "b.weight": 1, "a.weight_scale": 2}
    index = {"weight_map": {name: f"model-0000{number}-of-00002.safetensors" for name, number in files.items()}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    source = open_checkpoint(tmp_path / "model")
    assert torch.equal(source.read("a.weight"), (codes.float() * 0.5).bfloat16())
    assert torch.equal(source.read("b.weight"), plain)


def test_eight_bit_floats_without_a_scale_are_never_subtracted():
    codes = torch.randn(8, 4).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"quantised .*need their scales"):
        extract({"a.weight": codes}, {"a.weight": torch.randn(8, 4)}, rank=2)


@pytest.mark.parametrize(("form", "told"), [CASES[0], CASES[7], CASES[10]], ids=str)
def test_a_delta_on_a_quantised_base_is_found_to_its_rank(form, told, tmp_path):
    stored, wanted = compressed(form, told, torch.randn(48, 64).bfloat16())
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **told}}
    layer = {f"up.{name}": value for name, value in stored.items()}
    base = folder_of(tmp_path / "base", layer, config_of(form, group))
    b, a = torch.randn(48, 3), torch.randn(3, 64)
    tuned = {"up.weight": open_checkpoint(base).read("up.weight").float() + b @ a}
    adapter = extract(base, tuned, rank=3, dtype=torch.float32)
    ((_, factors, *_),) = adapter.layers.values()
    assert torch.allclose(factors.b @ factors.a, b @ a, atol=1e-3)
    assert wanted.shape == (48, 64)
