"""4-bit floats: NVFP4 and MXFP4 as compressed-tensors, ModelOpt, gpt-oss and DeepSeek store them."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from peft_posthoc import CheckpointError
from peft_posthoc.checkpoints.memory import InMemory
from peft_posthoc.sources import open_checkpoint

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# More rows than are decoded at once.
M, N = 300, 64


def opened(tensors, method=None):
    source = InMemory(tensors, label="model")
    source.config = {"quantization_config": {"quant_method": method}} if method else None
    return open_checkpoint(source)


def codes(*shape, dtype=torch.uint8):
    return torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype)


def by_hand(packed, scales):
    """In float32: one value after the other, the lower half of a byte first."""
    made = []
    for row, scale in zip(packed.view(torch.uint8).tolist(), scales.tolist(), strict=True):
        halves = [half for byte in row for half in (byte & 15, byte >> 4)]
        group = len(halves) // len(scale)
        made.append([(-1) ** (h >> 3) * VALUES[h & 7] * scale[at // group] for at, h in enumerate(halves)])
    return torch.tensor(made)


def compressed(form, scheme, tensors):
    arguments = QuantizationArgs(num_bits=4, type="float", symmetric=True, **scheme)
    weights = QuantizationScheme(targets=["Linear"], weights=arguments)
    return BaseCompressor.get_value_from_registry(form).decompress(tensors, weights)["weight"]


def nvfp4():
    scale = torch.rand(M, N // 16).add_(0.1).mul_(100).to(torch.float8_e4m3fn)
    return {"weight_packed": codes(M, N // 2), "weight_scale": scale, "weight_global_scale": torch.tensor([876.5])}


def test_compressed_tensors_nvfp4_divides_by_the_second_scale_as_it_does_itself():
    tensors = nvfp4()
    found = opened({f"x.{name}": tensor for name, tensor in tensors.items()}, "compressed-tensors").read("x.weight")
    wanted = by_hand(tensors["weight_packed"], tensors["weight_scale"].float() / tensors["weight_global_scale"])
    assert torch.equal(found, wanted.bfloat16())
    assert torch.equal(
        found, compressed("nvfp4-pack-quantized", {"strategy": "tensor_group", "group_size": 16}, tensors)
    )


def test_modelopt_s_nvfp4_multiplies():
    tensors = nvfp4()
    second = torch.tensor(1 / 1024)
    own = {"x.weight": tensors["weight_packed"], "x.weight_scale": tensors["weight_scale"], "x.weight_scale_2": second}
    source = opened({**own, "x.input_scale": torch.ones(())}, "modelopt")
    assert list(source.headers) == ["x.weight"]
    wanted = by_hand(tensors["weight_packed"], tensors["weight_scale"].float() / 1024)
    assert torch.equal(source.read("x.weight"), wanted.bfloat16())


def test_what_a_layer_s_input_is_multiplied_by_is_in_its_weight():
    """ModelOpt's and ComfyUI's `pre_quant_scale`, whatever the codes are."""
    tensors, smooth = nvfp4(), 2.0 ** torch.randint(-2, 3, (N,))
    four = {"weight": tensors["weight_packed"], "weight_scale": tensors["weight_scale"]}
    four["weight_scale_2"] = torch.tensor(1 / 1024)
    eight = {"weight": torch.randn(M, N).to(torch.float8_e4m3fn), "weight_scale": torch.tensor(0.5)}
    for own in (four, eight):
        own = {f"x.{name}": tensor for name, tensor in own.items()}
        plain, found = opened(own, "modelopt"), opened({**own, "x.pre_quant_scale": smooth}, "modelopt")
        assert list(found.headers) == ["x.weight"]
        assert torch.equal(found.read("x.weight"), (plain.read("x.weight") * smooth).bfloat16())
        assert torch.equal(found.steps("x.weight"), plain.steps("x.weight") * smooth)
    with pytest.raises(CheckpointError, match=r"`x.pre_quant_scale` is \(3,\); it scales no columns of `x.weight`"):
        opened({**own, "x.pre_quant_scale": torch.ones(3)}, "modelopt")


def test_compressed_tensors_mxfp4_is_what_it_decodes_itself():
    tensors = {"weight_packed": codes(M, N // 2), "weight_scale": torch.randint(100, 130, (M, N // 32)).to(torch.uint8)}
    source = opened({f"x.{name}": tensor for name, tensor in tensors.items()}, "compressed-tensors")
    assert torch.equal(
        source.read("x.weight"), compressed("mxfp4-pack-quantized", {"strategy": "group", "group_size": 32}, tensors)
    )


@pytest.mark.parametrize("scale", [torch.uint8, torch.float8_e8m0fnu])
def test_deepseek_s_experts_are_what_transformers_decodes(scale):
    weight = codes(M, N // 2, dtype=torch.int8)
    scales = torch.randint(100, 130, (M, N // 32)).to(torch.uint8).view(scale)
    found = opened({"experts.0.w1.weight": weight, "experts.0.w1.scale": scales}, "fp8").read("experts.0.w1.weight")
    assert torch.equal(found, Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16))


def test_a_stack_of_experts_is_what_transformers_makes_of_it():
    blocks = codes(2, M, N // 32, 16)
    scales = torch.randint(110, 130, (2, M, N // 32)).to(torch.uint8)
    stored = {"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": scales}
    source = opened({**stored, "experts.gate_up_proj_bias": torch.ones(2, M)}, "mxfp4")
    assert list(source.headers) == ["experts.gate_up_proj_bias", "experts.gate_up_proj"]
    found = source.read("experts.gate_up_proj")
    assert found.shape == source.headers["experts.gate_up_proj"].shape == (2, N, M)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))
    assert torch.equal(
        found[1, :, 7], by_hand(blocks[1, 7:8].flatten(1), 2.0 ** (scales[1, 7:8].float() - 127))[0].bfloat16()
    )
    # From 0 to 0.5, from 6 to 4: a code's neighbour.
    steps = source.steps("experts.gate_up_proj") / 2.0 ** (scales.float() - 127).repeat_interleave(32, 2).mT
    assert set(steps.unique().tolist()) == {0.5, 1.0, 2.0}


def test_scales_of_another_shape_are_refused():
    with pytest.raises(CheckpointError, match=r"`x_scales` is \(2, 4, 2\); for `x_blocks` it would be \(2, 4, 1\)"):
        opened({"x_blocks": codes(2, 4, 1, 16), "x_scales": codes(2, 4, 2)})
