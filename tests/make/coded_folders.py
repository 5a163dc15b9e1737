"""Folders of quantised models, each made of a plain one, with the library whose format it is where there is one."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.make import coded, models


def fp8(weight):
    """FP8 with one scale for a tensor."""
    scale = weight.abs().max() / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale.float()}


def fp8_rows(weight):
    """FP8 with a scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale.float()}


def fp8_blocks(weight, size=(24, 20)):
    """FP8 with a scale for each block, as DeepSeek and Qwen store it."""
    rows, columns = size
    filled = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    scale = filled.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).abs().amax((1, 3)) / 448
    each = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: weight.shape[0], : weight.shape[1]]
    return {"weight": (weight / each).to(torch.float8_e4m3fn), "weight_scale_inv": scale.float()}


def nvfp4(weight):
    """compressed-tensors' NVFP4."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
    over = (448 * 6 / weight.abs().max()).float().reshape(1)
    scale = (weight.unflatten(1, (-1, 16)).abs().amax(-1) / 6 * over).to(torch.float8_e4m3fn)
    state = {"weight": weight, "weight_scale": scale.float(), "weight_global_scale": over}
    library = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    return library.compress(state, QuantizationScheme(targets=["Linear"], weights=args))


def int4(weight, group=16):
    """compressed-tensors' pack-quantized."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    groups = weight.unflatten(1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    codes = (groups / scale).round().clamp(-8, 7).to(torch.int8).flatten(1)
    return {
        "weight_packed": pack_to_int32(codes, 4),
        "weight_scale": scale.squeeze(-1),
        "weight_shape": torch.tensor(weight.shape),
    }


def nf4(weight):
    """bitsandbytes' 4 bits."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return {"weight": codes, **{f"weight.{name}": x for name, x in state.as_dict(packed=True).items()}}


def gptq(weight):
    """GPTQ's 4 bits, with zeros of their own."""
    return coded.gptq(weight, 4, v1=1, act_order=False)[0]


def _weights(kind, bits, **more):
    return {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **more}


def _compressed(form, weights, ignore):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    told = {"config_groups": {"group_0": group}, "format": form, "ignore": ["lm_head", *ignore]}
    return {"quant_method": "compressed-tensors", "quantization_status": "compressed", **told}


def int4_config(group, ignore=()):
    """What the configuration says of `int4`."""
    return _compressed("pack-quantized", _weights("int", 4, strategy="group", group_size=group), ignore)


CONFIGS = {
    fp8: lambda ignore: _compressed("float-quantized", _weights("float", 8, strategy="tensor"), ignore),
    fp8_rows: lambda ignore: _compressed("float-quantized", _weights("float", 8, strategy="channel"), ignore),
    fp8_blocks: lambda ignore: {"quant_method": "fp8", "weight_block_size": [24, 20], "modules_to_not_convert": ignore},
    nvfp4: lambda ignore: _compressed(
        "nvfp4-pack-quantized", _weights("float", 4, strategy="tensor_group", group_size=16), ignore
    ),
    int4: lambda ignore: int4_config(16, ignore),
    gptq: lambda ignore: coded.BY_HAND["gptq, 3 bits"][0] | {"bits": 4, "desc_act": False},
    nf4: lambda ignore: {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", *ignore],
    },
}


def quantise(folder, out, how, *, but=(), said=None):
    """Write a model with the matrices of its layers quantised.

    Args:
        folder: A plain model, in one file.
        out: Where it goes.
        how: One of the functions above.
        but: Modules that stay as they are, by parts of their names.
        said: What the configuration says of it, if it is not as in `CONFIGS`.
    """
    shutil.copytree(folder, out)
    file, stored = models.weights_of(out), {}
    skipped = set()
    for name, tensor in load_file(file).items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module.endswith(("_proj", "proj")) and tensor.ndim == 2:
            if not any(part in name for part in but):
                stored |= {f"{module}.{own}": x.contiguous() for own, x in how(tensor).items()}
                continue
            skipped.add(module)
        stored[name] = tensor
    save_file(stored, file, metadata={"format": "pt"})
    path = Path(out) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": said or CONFIGS[how](sorted(skipped))}))
    return str(out)
