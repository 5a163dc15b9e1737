"""Weights of 8 bits with their scales: blocks that are cut off at the edges, ComfyUI's files, DeepSeek's own names."""

import json

import pytest
import torch
from safetensors.torch import save_file

from peft_posthoc import CheckpointError
from peft_posthoc.checkpoints.memory import InMemory
from peft_posthoc.sources import open_checkpoint

E4M3 = torch.float8_e4m3fn


def codes(*shape, dtype=E4M3):
    return torch.randint(-100, 100, shape).to(dtype)


def by_hand(codes, scale, size):
    """Each value times the scale of the block that it is in, in bfloat16."""
    rows, columns = (torch.arange(side) // one for side, one in zip(codes.shape, size, strict=True))
    return (codes.float() * scale.float()[rows][:, columns]).bfloat16()


def told(tensors, **config):
    source = InMemory(tensors, label="model")
    source.config = {"quantization_config": {"quant_method": "fp8", **config}}
    return open_checkpoint(source)


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "scale"])
def test_blocks_at_the_edges_are_cut_off_and_not_made_smaller(leaf):
    weight, scale = codes(300, 200), torch.rand(3, 2)
    source = open_checkpoint({"x.weight": weight, f"x.{leaf}": scale})
    assert source.headers == {"x.weight": ((300, 200), torch.bfloat16)}
    assert torch.equal(source.read("x.weight"), by_hand(weight, scale, (128, 128)))
    assert source.coded_as("x.weight") == "FP8 by block"


@pytest.mark.parametrize("size", [(100, 100), (149, 199)])
def test_blocks_are_as_large_as_the_configuration_says(size):
    weight, scale = codes(300, 200), torch.rand(-(-300 // size[0]), -(-200 // size[1]))
    source = told({"x.weight": weight, "x.weight_scale_inv": scale}, weight_block_size=list(size))
    assert torch.equal(source.read("x.weight"), by_hand(weight, scale, size))


def test_modelopt_s_blocks_have_sides_of_one_between():
    weight, scale = codes(256, 384), torch.rand(2, 3)
    source = open_checkpoint({"x.weight": weight, "x.weight_scale": scale[:, None, :, None]})
    assert torch.equal(source.read("x.weight"), by_hand(weight, scale, (128, 128)))


@pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e8m0fnu])
def test_exponents_of_two_scale_groups_of_32(stored):
    weight, exponents = codes(20, 96), torch.randint(120, 130, (20, 3)).to(torch.uint8)
    source = open_checkpoint({"x.weight": weight, "x.weight_scale": exponents.view(stored)})
    assert torch.equal(source.read("x.weight"), by_hand(weight, 2.0 ** (exponents.float() - 127), (1, 32)))


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 40), (3, 2, 3), (3, 1, 70)], ids=str)
def test_a_stack_of_experts_has_scales_for_each(shape):
    stack, scale = codes(3, 40, 70), torch.rand(shape)
    size = torch.Size([20, 24]) if scale.shape == (3, 2, 3) else None
    config = {"weight_block_size": list(size)} if size else {}
    source = told({"experts.up": stack, "experts.up_scale_inv": scale}, **config)
    for at in range(3):
        own = scale[at][:, None] if scale.ndim == 2 else scale[at]
        sides = size or [40 // own.shape[0], -(-70 // own.shape[1])]
        assert torch.equal(source.read("experts.up")[at], by_hand(stack[at], own, sides))


def test_modelopt_s_stack_of_experts_has_scales_by_its_own_name():
    stack, scale = codes(3, 40, 70), torch.tensor([0.5])
    beside = {"experts.up_proj_weight_scale": scale, "experts.up_proj_input_scale": torch.ones(1)}
    source = open_checkpoint({"experts.up_proj": stack, **beside})
    assert source.headers.keys() == {"experts.up_proj"}
    assert torch.equal(source.read("experts.up_proj"), (stack.float() * 0.5).bfloat16())


@pytest.mark.parametrize("shape", [(6,), (6, 4, 3, 3), (6, 4, 5)], ids=str)
def test_convolutions_and_vectors_have_one_scale_or_one_for_each_row(shape):
    weight = codes(*shape)
    for scale in (torch.tensor(0.3), torch.tensor([0.3]), torch.rand(6), torch.rand(6, *[1] * (len(shape) - 1))):
        source = open_checkpoint({"x.weight": weight, "x.weight_scale": scale})
        wanted = weight.float() * scale.reshape(-1, *[1] * (len(shape) - 1))
        assert torch.equal(source.read("x.weight"), wanted.bfloat16())


def test_comfyui_s_older_files_have_a_mark_and_scales_by_another_name(tmp_path):
    weight, begin = codes(8, 6), "model.diffusion_model."
    stored = {
        f"{begin}x.weight": weight,
        f"{begin}x.scale_weight": torch.tensor(0.25),
        f"{begin}x.scale_input": torch.tensor(1.0),
        f"{begin}x.bias": torch.ones(8).half(),
        f"{begin}scaled_fp8": torch.empty(0, dtype=E4M3),
    }
    save_file(stored, tmp_path / "model.safetensors")
    source = open_checkpoint(tmp_path / "model.safetensors")
    assert set(source.headers) == {f"{begin}x.weight", f"{begin}x.bias"}
    assert torch.equal(source.read(f"{begin}x.weight"), (weight.float() * 0.25).bfloat16())


@pytest.mark.parametrize("place", ["file", "folder"])
def test_comfyui_s_files_say_in_their_header_how_large_blocks_are(place, tmp_path):
    weight, whole, scale = codes(300, 300, dtype=torch.int8), codes(8, 6), torch.rand(2, 2)
    layers = {"x": {"format": "int8_blockwise", "group_size": 200}, "y": {"format": "float8_e4m3fn"}}
    said = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    stored = {"x.weight": weight, "x.weight_scale": scale, "y.weight": whole, "y.weight_scale": torch.tensor(0.5)}
    save_file({**stored, "y.input_scale": torch.ones(())}, tmp_path / "model.safetensors", metadata=said)
    source = open_checkpoint(tmp_path / ("model.safetensors" if place == "file" else ""))
    assert set(source.headers) == {"x.weight", "y.weight"}
    assert torch.equal(source.read("x.weight"), by_hand(weight, scale, (200, 200)))
    assert torch.equal(source.read("y.weight"), (whole.float() * 0.5).bfloat16())
    assert source.coded_as("x.weight") == "ComfyUI, INT8 by block"


def test_a_weight_that_lacks_the_scale_that_others_have_is_refused():
    stored = {"x.weight": codes(8, 6), "x.weight_scale": torch.tensor(0.5), "y.weight": codes(8, 6)}
    with pytest.raises(CheckpointError, match=r"`y.weight` of `state dict` holds codes \(float8_e4m3fn\) and lacks"):
        open_checkpoint(stored)


@pytest.mark.parametrize("said", [{"weight_block_size": [0, "x"]}, {"config_groups": ["x"]}], ids=str)
def test_a_configuration_that_nobody_understands_is_refused_in_a_line(said):
    with pytest.raises(CheckpointError, match=r"What says how `model` is quantised is not understood: "):
        told({"x.weight": codes(256, 256), "x.weight_scale_inv": torch.rand(2, 2)}, **said)


def test_what_a_header_says_that_is_no_json_is_refused(tmp_path):
    stored = {"y.weight": codes(8, 6), "y.weight_scale": torch.tensor(0.5)}
    save_file(stored, tmp_path / "model.safetensors", metadata={"_quantization_metadata": "{"})
    with pytest.raises(CheckpointError, match=r"`_quantization_metadata` of .* is no JSON"):
        open_checkpoint(tmp_path / "model.safetensors")
