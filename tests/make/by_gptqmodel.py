"""Layers as GPTQModel packs them, and digests of what it decodes: `tests/checkpoints/quantised/gptqmodel.safetensors`.

    pip install gptqmodel==7.7.0
    python tests/make/by_gptqmodel.py

GPTQModel is far too much for an environment of tests, so that what it says is kept.
"""

import hashlib
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization import FORMAT, QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

M, N, GROUP = 32, 64, 16
OUT = Path(__file__).parents[1] / "checkpoints/quantised/gptqmodel.safetensors"


def grid(weight, groups, bits, *, symmetric):
    """Scales and zeros, out features x groups."""
    highest = 2**bits - 1
    parts = [weight[:, groups == at] for at in range(N // GROUP)]
    low = torch.stack([part.amin(1) for part in parts], 1).clamp(max=0)
    high = torch.stack([part.amax(1) for part in parts], 1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        return (2 * high / highest).half().float(), torch.full_like(high, 2 ** (bits - 1))
    scales = ((high - low) / highest).half().float()
    # A zero of 0 is lost where its neighbours' words are shifted for the first version of the format.
    return scales, (-low / scales).round().clamp(1, highest)


def packed(layer, groups, bits, *, symmetric=False):
    linear = torch.nn.Linear(N, M, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.randn(M, N) / 8)
    layer.pack(linear, *grid(linear.weight, groups, bits, symmetric=symmetric), groups)
    return layer


def stored(layer):
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {name: getattr(layer, name).clone() for name in names if getattr(layer, name, None) is not None}


def gptq(bits, *, v1, act_order, symmetric=False):
    sizes = {"bits": bits, "group_size": GROUP, "in_features": N, "out_features": M}
    asked = {"sym": symmetric, "desc_act": act_order}
    layer = TorchLinear(**sizes, **asked, format=FORMAT.GPTQ_V2)
    groups = torch.arange(N, dtype=torch.int32) // GROUP
    packed(layer, groups[torch.randperm(N)] if act_order else groups, bits, symmetric=symmetric)
    layer.post_init()
    weight = layer.dequantize_weight().T.contiguous()
    if v1:
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=GROUP, **asked))
    return {**stored(layer), "weight": weight}


def awq():
    layer = AwqTorchLinear(
        bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=N, out_features=M, register_buffers=False
    )
    packed(layer, torch.arange(N) // GROUP, 4)
    layer.post_init()
    weight = layer._dequantize_weight_for_inference(torch.zeros(1), dtype=torch.float16).T.contiguous()
    return {name: value for name, value in stored(layer).items() if name != "g_idx"} | {"weight": weight}


if __name__ == "__main__":
    torch.manual_seed(0)
    layers = {
        "gptq.2": gptq(2, v1=True, act_order=False),
        "gptq.3": gptq(3, v1=True, act_order=True),
        "gptq_v2.3": gptq(3, v1=False, act_order=False),
        "gptq_v2.4": gptq(4, v1=False, act_order=True),
        "gptq.4": gptq(4, v1=True, act_order=False, symmetric=True),
        "gptq.8": gptq(8, v1=True, act_order=True),
        "awq.4": awq(),
    }
    digests = {layer: hashlib.sha256(own.pop("weight").numpy().tobytes()).hexdigest() for layer, own in layers.items()}
    save_file({f"{layer}.{name}": value for layer, own in layers.items() for name, value in own.items()}, OUT, digests)
