"""`--to comfyui` of two single files under their authors' names, by the names that ComfyUI gives what it loads of them.

From Comfy-Org/ComfyUI, `comfy/supported_models.py` of 2026: HunyuanVideo's are made like Flux', and Flux' norms are
called `.weight`; `comfy/lora.py`: a key is `diffusion_model.` and the name.
"""

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from peft_posthoc.cli.main import main
from tests.formats.test_image_files import distance
from tests.make.diffusion import moved
from tests.make.originals import FAMILIES, PREFIX, under_original_names

HUNYUAN = {
    **{"t_embedder.mlp.0": "t_embedder.in_layer", "t_embedder.mlp.2": "t_embedder.out_layer"},
    **{"c_embedder.linear_1": "c_embedder.in_layer", "c_embedder.linear_2": "c_embedder.out_layer"},
    **{"_mod.linear": "_mod.lin", "_attn_qkv": "_attn.qkv", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"},
    **{"_attn_q_norm": "_attn.norm.query_norm", "_attn_k_norm": "_attn.norm.key_norm"},
    **{".q_norm": ".norm.query_norm", ".k_norm": ".norm.key_norm", "_attn_proj": "_attn.proj"},
    **{".modulation.linear": ".modulation.lin", "_in.mlp.2": "_in.out_layer", "_in.mlp.0": "_in.in_layer"},
}
CASES = [("flux", ""), ("hunyuan-video", ""), ("hunyuan-video", PREFIX), ("wan", ""), ("sd15", PREFIX), ("ltx", "")]


def written(model, prefix, file):
    save_file({name: value.contiguous() for name, value in under_original_names(model, prefix=prefix).items()}, file)
    return file


def as_comfyui_loads(file, prefix, family):
    """By the names of ComfyUI's own model."""
    found = {}
    for name, value in load_file(file).items():
        new = name.removeprefix(prefix).replace("_norm.scale", "_norm.weight")
        for before, after in HUNYUAN.items() if family == "hunyuan-video" else ():
            new = new.replace(f"{before}.", f"{after}.")
        found[new] = value
    return found


def applied(lora, weights):
    """What ComfyUI makes of a model with a file; every key must be used."""
    tensors, used = load_file(lora), set()
    for name, value in weights.items():
        stem = f"diffusion_model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_up.weight" in tensors:
            own = [f"{stem}.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha")]
            up, down, alpha = (tensors[one] for one in own)
            value += (up.flatten(1) @ down.flatten(1) * (alpha / len(down))).reshape(value.shape)
            used |= {*own}
        key = f"{stem.removesuffix('.bias')}.diff_b" if name.endswith(".bias") else f"{stem}.diff"
        if key in tensors:
            value += tensors[key]
            used.add(key)
    assert used == tensors.keys()
    return weights


@pytest.mark.parametrize(("family", "prefix"), CASES)
def test_comfyui_makes_the_fine_tune_of_its_base_and_base_plus_file_is_it(family, prefix, tmp_path):
    torch.manual_seed(0)
    base = FAMILIES[family]()
    before = written(base, prefix, tmp_path / "base.safetensors")
    after = written(moved(base, torch.nn.Module), prefix, tmp_path / "tuned.safetensors")
    lora = tmp_path / "lora.safetensors"
    words = [before, after, lora, "--to", "comfyui", "--rank", "256", "--conv", "--dtype", "float32", "--quiet"]
    done = CliRunner().invoke(main, ["extract", *map(str, words)])
    assert not done.exit_code, done.output
    made, wanted = (as_comfyui_loads(file, prefix, family) for file in (before, after))
    made = applied(lora, made)
    assert max((made[name] - wanted[name]).abs().max() for name in wanted) < 1e-5
    assert distance(f"{before}+{lora}", after) < 1e-5
