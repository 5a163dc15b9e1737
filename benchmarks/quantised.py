"""Adapters on a base that is served in INT4: `quantised.py WORK BASE TUNED...` prints docs/quantised.md's tables.

The linear layers of the base are rounded to INT4, with a scale for each 64 values of a row, and written as
compressed-tensors does. On it, adapters of rank 8 of these layers and the head: of the total delta, of the task's
(`--for-base`), and the task's refined on 320 texts that the models write. What is printed is
KL(tuned || quantised base + adapter) of the next token on held-out text like the task's and on general text.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

from peft_posthoc import extract, refine

RANK, GROUP, TEXTS = 8, 64, 320


def in_int4(base: Path, out: Path) -> Path:
    """The base, its linear layers in INT4."""
    shutil.copytree(base, out)
    stored = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        groups = weight.unflatten(1, (-1, GROUP))
        scale = groups.abs().amax(-1, keepdim=True) / 7
        codes = (groups / scale).round().clamp(-8, 7).to(torch.int8).flatten(1)
        module = name.removesuffix(".weight")
        stored |= {
            f"{module}.weight_packed": pack_to_int32(codes, 4),
            f"{module}.weight_scale": scale.squeeze(-1),
            f"{module}.weight_shape": torch.tensor(weight.shape),
        }
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    told = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    config = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    return out


def rows(work: Path, base: Path, tuned: Path) -> None:
    """Print what each adapter comes to."""
    low = work / f"{base.name}-int4"
    if not low.exists():
        in_int4(base, low)
    for kind, first, options in (("total", low, {}), ("task", base, {"for_base": low})):
        made = extract(first, tuned, RANK, head=True, **options)
        for line in (*made.report.notes, *made.report.warnings):
            print(line)
        start = made.save(work / f"{tuned.name}-{kind}", force=True)
        found = refine(start, low, tuned, sequences=TEXTS)
        for what, told in (("no adapter", found.base), (f"{kind}, SVD", found.before), ("refined", found.after)):
            print(tuned.name, what, *(f"{text} {one.kl:.4f}" for text, one in told.items()), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for fine_tune in sys.argv[3:]:
        rows(Path(sys.argv[1]), Path(sys.argv[2]), Path(fine_tune))
