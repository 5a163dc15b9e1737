"""GPTQ, AWQ and bitsandbytes: the numbers of one layer, as their own programs decode them, and by hand."""

import hashlib
import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors import safe_open
from safetensors.torch import load_file

from peft_posthoc.checkpoints.quantized.awq import gemm, gemv
from peft_posthoc.checkpoints.quantized.bitsandbytes import eight_bits, four_bits, said
from peft_posthoc.checkpoints.quantized.gptq import gptq
from peft_posthoc.checkpoints.quantized.grid import unpacked
from tests.make.coded import pack

KEPT = Path(__file__).parent / "quantised/gptqmodel.safetensors"
LAYERS = ["gptq.2", "gptq.3", "gptq_v2.3", "gptq_v2.4", "gptq.4", "gptq.8", "awq.4"]


def kept(layer):
    """A layer that GPTQModel packed, and the digest of what it decodes."""
    with safe_open(KEPT, framework="pt") as file:
        wanted = file.metadata()[layer]
    tensors = {name.partition(f"{layer}.")[2]: value for name, value in load_file(KEPT).items()}
    return {name: value for name, value in tensors.items() if name}, wanted


def digest(weight):
    return hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_what_gptqmodel_decodes_to_the_last_bit(layer):
    tensors, wanted = kept(layer)
    form, bits = layer.split(".")
    weight = gemm(**tensors) if form == "awq" else gptq(**tensors, bits=int(bits), offset=int(form == "gptq"), group=16)
    assert weight.shape == (32, 64)
    assert weight.dtype == torch.float16
    assert digest(weight) == wanted


@pytest.mark.parametrize("layer", ["gptq.2", "gptq_v2.3", "gptq.4"])
def test_without_its_groups_a_layer_has_neighbours_in_them(layer):
    tensors, wanted = kept(layer)
    form, bits = layer.split(".")
    for none in (None, torch.empty(0, dtype=torch.int32)):
        without = {**tensors, "g_idx": none}
        assert digest(gptq(**without, bits=int(bits), offset=int(form == "gptq"), group=16)) == wanted


def test_without_zeros_they_are_the_middle():
    tensors, wanted = kept("gptq.4")
    assert digest(gptq(**{**tensors, "qzeros": None}, bits=4, offset=1, group=16)) == wanted


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_numbers_straddle_words(bits):
    numbers = torch.randint(0, 2**bits, (3, 64))
    assert torch.equal(unpacked(pack(numbers, bits), bits).long(), numbers)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("offset", [0, 1])
def test_gptq_by_hand_with_a_last_group_of_fewer_and_words_that_are_not_full(bits, offset):
    m, n, group = 7, 45, 16
    codes, zeros = torch.randint(0, 2**bits, (m, n)), torch.randint(0, 2**bits, (3, m))
    scales, g_idx = torch.rand(3, m).half(), (torch.arange(n) // group)[torch.randperm(n)]
    lacking = (zeros - offset) % 2**bits  # 0 is stored as the largest.
    full = [torch.nn.functional.pad(part, (0, -part.shape[1] % 32)) for part in (codes, lacking)]
    stored = {"qweight": pack(full[0], bits).T, "qzeros": pack(full[1], bits), "g_idx": g_idx.int(), "scales": scales}
    wanted = torch.stack(
        [
            torch.stack([scales[g_idx[j], i] * (codes[i, j] - zeros[g_idx[j], i]).half() for j in range(n)])
            for i in range(m)
        ]
    )
    assert torch.equal(gptq(**stored, bits=bits, offset=offset, group=group), wanted)


def test_awq_s_order_by_hand():
    # A word of AWQ's kernels: in its lowest bits feature 0, then 2, 4, 6, 1, 3, 5 and 7 (packing in AutoAWQ's
    # `WQLinear_GEMM`, reading in vLLM's `awq_dequantize_kernel`).
    word = sum(number << 4 * at for at, number in enumerate([0, 2, 4, 6, 1, 3, 5, 7]))
    ones = torch.ones(1, 8, dtype=torch.float16)
    weight = gemm(torch.tensor([[word]], dtype=torch.int32), ones, torch.zeros(1, 1, dtype=torch.int32))
    assert weight[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_awq_is_what_compressed_tensors_makes_of_it():
    tensors, _ = kept("awq.4")
    found = AutoAWQConverter(group_size=16).process({f"layer.{name}": value for name, value in tensors.items()})
    arguments = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=16, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    decoded = compressor.decompress({name.removeprefix("layer."): value for name, value in found.items()}, scheme)
    assert torch.equal(gemm(**tensors), decoded["weight"])


def test_gemv_has_its_own_order_and_more_groups_than_there_are():
    m, n, group = 8, 192, 64
    codes, zeros = torch.randint(0, 16, (m, n)), torch.randint(0, 16, (m, 3))
    scales = torch.rand(m, 3).half()
    stored = {"scales": torch.nn.functional.pad(scales, (0, 13)), "qweight": pack(codes, 4)}
    stored["qzeros"] = pack(torch.nn.functional.pad(zeros, (0, 13)), 4)
    each = torch.arange(n) // group
    assert torch.equal(gemv(**stored, group=group), (codes - zeros[:, each]).half() * scales[:, each])


def quantised(weight, **how):
    """Codes, and what bitsandbytes stores beside them."""
    codes, state = bnb.quantize_4bit(weight, **how)
    return codes, state.as_dict(packed=True)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 32), (3, 96), (20, 10)])
def test_four_bits_by_hand(kind, nested, dtype, shape):
    weight = torch.randn(shape).to(dtype)
    codes, state = quantised(weight, quant_type=kind, compress_statistics=nested)
    decoded = four_bits(codes, state)
    numbers = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()[: weight.numel()].long()
    scales = state["absmax"]
    if nested:
        told = said(state["quant_state.bitsandbytes__nf4" if kind == "nf4" else "quant_state.bitsandbytes__fp4"])
        blocks = torch.arange(len(scales)) // told["nested_blocksize"]
        scales = state["nested_quant_map"][scales.long()] * state["nested_absmax"][blocks] + told["nested_offset"]
    wanted = state["quant_map"][numbers] * scales[torch.arange(weight.numel()) // 64]
    assert torch.equal(decoded, wanted.reshape(shape).to(dtype))


def test_codes_that_are_stored_as_another_type_are_the_same():
    weight = torch.randn(48, 32)
    wanted = four_bits(*quantised(weight, quant_type="nf4"))
    codes, state = quantised(weight, quant_type="nf4", quant_storage=torch.bfloat16)
    assert codes.dtype is torch.bfloat16
    assert torch.equal(four_bits(codes, state), wanted)
    assert torch.equal(four_bits(codes.T, state), wanted)


def test_what_a_state_says_is_read():
    _, state = quantised(torch.randn(48, 32, dtype=torch.bfloat16), quant_type="nf4")
    told = said(state["quant_state.bitsandbytes__nf4"])
    assert (told["shape"], told["dtype"], told["blocksize"]) == ([48, 32], "bfloat16", 64)
    assert json.dumps(told)


def test_eight_bits_by_hand():
    codes, scales = torch.randint(-127, 128, (12, 20)).to(torch.int8), torch.rand(12)
    assert torch.allclose(eight_bits(codes, scales), codes * scales[:, None] / 127, rtol=1e-6)
