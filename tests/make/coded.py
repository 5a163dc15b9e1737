"""Tiny models as GPTQ, AWQ and bitsandbytes store them, and what they compute, known from their making."""

import json
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.make import models

GROUP = 16


def pack(numbers, bits):
    """Whole numbers along the last side as words, low bits first, by Python's own arithmetic."""
    rows = []
    for row in numbers.tolist():
        stream = sum(number << bits * at for at, number in enumerate(row))
        words = [stream >> 32 * at & 0xFFFFFFFF for at in range(-(-len(row) * bits // 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def grid(weight, bits):
    """Codes, zeros, scales and groups of a weight, and what they stand for."""
    highest, groups = 2**bits - 1, torch.arange(weight.shape[1]) // GROUP
    parts = weight.unflatten(1, (-1, GROUP))
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    scales = ((high - low) / highest).half()
    zeros = (-low / scales.float()).round().clamp(1, highest)
    codes = (weight / scales.float()[:, groups] + zeros[:, groups]).round().clamp(0, highest)
    return codes.int(), zeros.int(), scales, (codes - zeros[:, groups]).half() * scales[:, groups]


def gptq(weight, bits, *, v1, act_order):
    """The tensors of a layer, and its weight."""
    order = torch.randperm(weight.shape[1]) if act_order else torch.arange(weight.shape[1])
    codes, zeros, scales, made = grid(weight[:, order], bits)
    back = order.argsort()
    filled = torch.nn.functional.pad(codes[:, back], (0, -weight.shape[1] % 32))
    tensors = {
        "qweight": pack(filled, bits).T.contiguous(),
        "qzeros": pack(torch.nn.functional.pad(zeros.T - v1, (0, -weight.shape[0] % 32)), bits),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP)[back].int(),
    }
    return tensors, made[:, back].contiguous()


def awq(weight):
    codes, zeros, scales, made = grid(weight, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    codes, zeros = (one.T.unflatten(1, (-1, 8))[..., order].flatten(1) for one in (codes, zeros))
    return {"qweight": pack(codes, 4), "qzeros": pack(zeros, 4), "scales": scales.T.contiguous()}, made


def gemv(weight):
    codes, zeros, scales, made = grid(weight, 4)
    more = -zeros.shape[1] % 8
    filled = [torch.nn.functional.pad(one, (0, more)) for one in (zeros, scales)]
    return {"qweight": pack(codes, 4), "qzeros": pack(filled[0], 4), "scales": filled[1]}, made


def _gptq(bits, form, **how):
    said = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": False, "checkpoint_format": form}
    return {**said, "desc_act": how["act_order"]}, lambda weight: gptq(weight, bits, v1=int(form == "gptq"), **how)


def _awq(version, layer):
    return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": version, "zero_point": True}, layer


BY_HAND = {
    "gptq, 2 bits": _gptq(2, "gptq", act_order=False),
    "gptq, 3 bits": _gptq(3, "gptq", act_order=True),
    "gptq, 4 bits": _gptq(4, "gptq_v2", act_order=True),
    "gptq, 8 bits": _gptq(8, "gptq_v2", act_order=False),
    "awq": _awq("gemm", awq),
    "awq gemv": _awq("gemv", gemv),
}
BITSANDBYTES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
SCHEMES = [*BY_HAND, *BITSANDBYTES]


def save(model, folder, scheme):
    """Quantise the linear layers of a model but its head, and save it.

    Returns:
        The weights that it then computes with, by name.
    """
    if scheme in BITSANDBYTES:
        models.save(model, folder / "plain")
        return save_by_bitsandbytes(folder / "plain", folder, scheme)
    said, layer = BY_HAND[scheme]
    models.save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    made = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        own, made[name] = layer(tensors.pop(name))
        tensors |= {name.replace("weight", leaf): value.contiguous() for leaf, value in own.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return made


def live(plain, scheme, **how):
    """A model that bitsandbytes quantises when it is loaded."""
    config = transformers.BitsAndBytesConfig(**BITSANDBYTES[scheme], **how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map="cpu")


def save_by_bitsandbytes(plain, folder, scheme):
    model = live(plain, scheme)
    model.save_pretrained(folder)
    return {name: value.clone() for name, value in model.dequantize(dtype=torch.float32).state_dict().items()}


def dequantized(made, folder, like):
    """A folder of a plain model with these weights."""
    model = models.load(like)
    model.load_state_dict({name: value.float() for name, value in made.items()}, strict=False)
    return models.save(model, Path(folder))
