"""The step of a grid at each value, asked of what decodes the codes."""

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file

from peft_posthoc.checkpoints.quantized.awq import gemm
from peft_posthoc.checkpoints.quantized.bitsandbytes import eight_bits, four_bits
from peft_posthoc.checkpoints.quantized.gptq import gptq
from peft_posthoc.checkpoints.quantized.steps import steps

KEPT = load_file(Path(__file__).parent / "quantised/gptqmodel.safetensors")
M, N, GROUP = 24, 96, 16


def weight(seed=0):
    return torch.randn(M, N, generator=torch.Generator().manual_seed(seed)) / 50


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_whole_numbers_are_a_scale_apart(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (M, N), dtype=torch.int8)
    scale = weight().abs()[:, :1]
    found = steps(
        lambda words: unpack_from_int32(words, bits, torch.Size((M, N))) * scale, pack_to_int32(codes, bits), bits
    )
    assert torch.allclose(found, scale.expand(M, N), rtol=1e-4)


@pytest.mark.parametrize("layer", ["gptq.2", "gptq.3", "gptq.4", "gptq_v2.4", "gptq.8", "awq.4"])
def test_gptq_and_awq_are_a_scale_of_their_group_apart(layer):
    own = {name.partition(f"{layer}.")[2]: value for name, value in KEPT.items() if name.startswith(f"{layer}.")}
    form, bits = layer.split(".")
    words, scales = own.pop("qweight"), own["scales"].T.float()
    groups = own["g_idx"].long() if "g_idx" in own else torch.arange(64) // 16

    def decode(words):
        if form == "awq":
            return gemm(words, **own)
        return gptq(words, **own, bits=int(bits), offset=int(form == "gptq"), group=16)

    assert torch.allclose(
        steps(decode, words, int(bits)), scales[:, groups], rtol=0.13
    )  # of float16, for numbers up to 255


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_float_of_eight_bits_is_apart_as_its_exponent_says_at_the_largest_too(dtype):
    scale = weight().abs().max() / torch.finfo(dtype).max
    codes = (weight() / scale).to(dtype)
    found = steps(lambda codes: codes.float() * scale, codes, 8)
    assert torch.isfinite(found).all()
    value = codes.float().abs()
    wanted = torch.exp2(value.log2().floor()).clamp(min=torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps
    assert torch.allclose(found, wanted * scale)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_error_that_bitsandbytes_makes_is_the_one_to_be_expected(kind):
    before = weight()
    if kind == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(before.half())
        found = steps(lambda codes: eight_bits(codes, scales), codes, 8)
        after = eight_bits(codes, scales)
    else:
        codes, state = bnb.quantize_4bit(before, blocksize=64, quant_type=kind)
        told = state.as_dict(packed=True)
        found = steps(lambda codes: four_bits(codes, told), codes, 4)
        after = four_bits(codes, told)
    made, expected = (after - before).square().sum(), found.square().sum() / 12
    assert 0.8 < made / expected < 1.25
