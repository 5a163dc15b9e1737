"""How long quantised weights take to read: `reading_quantised.py` prints the table of docs/quantised.md.

Each format holds a matrix of 4096 x 4096 (gpt-oss one expert of its own size). It is read, and brought to float32, as
the loop of an extraction does it; beside it the same is done with bfloat16. What is printed is the least of many
rounds over the least of bfloat16's, which leaves out what else the machine does.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.gguf import Gguf
from peft_posthoc.sources import open_checkpoint

M = N = 4096
BF16 = "bfloat16"


def stored() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, object]]]:
    """By format, the tensors and what the configuration says of them."""
    from bitsandbytes.functional import quantize_4bit

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 255, shape, dtype=torch.uint8)

    eight, scales = (torch.randn(M, N) * 0.1).to(torch.float8_e4m3fn), torch.rand(N // 128, M).half()
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    packed = {"weight_packed": words(M, N // 8), "weight_scale": scales.T.bfloat16().contiguous()}
    gptq = {"qweight": words(N // 8, M), "qzeros": words(N // 128, M // 8), "scales": scales}
    awq = {"qweight": words(N, M // 8), "qzeros": words(N // 128, M // 8), "scales": scales}
    nvfp4 = {"weight": codes(M, N // 2), "weight_scale": torch.rand(M, N // 16).to(torch.float8_e4m3fn)}
    four, state = quantize_4bit(torch.randn(M, N).bfloat16(), blocksize=64, quant_type="nf4")
    grouped = {"bits": 4, "group_size": 128}
    return {
        BF16: ({"weight": torch.randn(M, N).bfloat16()}, {}),
        "FP8, a scale for each row": ({"weight": eight, "weight_scale": torch.rand(M, 1)}, {"quant_method": "fp8"}),
        "FP8, a scale for each block": (
            {"weight": eight, "weight_scale_inv": torch.rand(32, 32)},
            {"quant_method": "fp8"},
        ),
        "INT4, compressed-tensors": (
            {**packed, "weight_shape": torch.tensor([M, N])},
            {"quant_method": "compressed-tensors", "config_groups": {"0": {"targets": ["Linear"], "weights": weights}}},
        ),
        "NVFP4": ({**nvfp4, "weight_scale_2": torch.tensor(0.3)}, {"quant_method": "modelopt"}),
        "GPTQ, 4 bits": ({**gptq, "g_idx": (torch.arange(N) // 128).int()}, {"quant_method": "gptq", **grouped}),
        "AWQ, 4 bits": (awq, {"quant_method": "awq", "version": "gemm", **grouped}),
        "MXFP4, a stack of gpt-oss": (
            {"weight_blocks": codes(1, 5760, 90, 16), "weight_scales": codes(1, 5760, 90) // 16 + 112},
            {"quant_method": "mxfp4"},
        ),
        "NF4, bitsandbytes": (
            {"weight": four, **{f"weight.{name}": one for name, one in state.as_dict(packed=True).items()}},
            {"quant_method": "bitsandbytes"},
        ),
    }


def opened(folder: Path) -> dict[str, Checkpoint]:
    """By format, what is read."""
    found: dict[str, Checkpoint] = {}
    for at, (name, (tensors, told)) in enumerate(stored().items()):
        place = folder / str(at)
        place.mkdir()
        save_file({f"x.{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()}, place / "model.safetensors")
        config = {"dtype": BF16, **({"quantization_config": told} if told else {})}
        (place / "config.json").write_text(json.dumps(config))
        found[name] = open_checkpoint(place)
    for kind in ("Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"):
        own = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[own]
        blocks = np.random.default_rng(0).integers(0, 60, (M, N // block * size), dtype=np.uint8)
        writer = gguf.GGUFWriter(folder / f"{kind}.gguf", "llama")
        writer.add_tensor("weight", blocks, raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found[f"GGUF, {kind}"] = Gguf(folder / f"{kind}.gguf", label=kind)
    return found


def measured(rounds: int) -> dict[str, float]:
    """By format, the least time for 4096 x 4096 values, in seconds."""
    least: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = opened(Path(folder))
        for _ in range(rounds):
            for name, source in sources.items():
                weight = next(iter(source.headers))
                start = time.perf_counter()
                made = source.read(weight).float()
                spent = (time.perf_counter() - start) * M * N / made.numel()
                least[name] = min(spent, least.get(name, spent))
    return least


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    times = measured(int(sys.argv[2]) if len(sys.argv) > 2 else 20)
    print(f"{torch.get_num_threads()} threads; bfloat16 {times[BF16] * 1e3:.0f} ms")
    for name, spent in times.items():
        print(f"| {name} | {spent / times[BF16]:.1f} |")
