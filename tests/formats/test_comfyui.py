"""`--to comfyui` by ComfyUI's own rules, stated here: a key for every weight, what is added, and what would be lost.

From Comfy-Org/ComfyUI, `comfy/lora.py` and `comfy/utils.py`, as of 2026: the names that it looks for, by model, and the
weights or rows of weights that they lead to. A difference of a bias is looked up beside a whole weight alone.
"""

import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import export, extract, open_checkpoint
from tests.formats.test_image_files import distance, save_pair
from tests.make import diffusion, small

# Of Flux' and SD3's modules by diffusers' names: the original's, which third of it, or `swap` for turned halves.
FLUX = {
    "transformer_blocks.0.attn.to_q": ("double_blocks.0.img_attn.qkv", 0),
    "transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv", 1),
    "transformer_blocks.0.attn.to_v": ("double_blocks.0.img_attn.qkv", 2),
    "transformer_blocks.0.attn.add_q_proj": ("double_blocks.0.txt_attn.qkv", 0),
    "transformer_blocks.0.attn.add_k_proj": ("double_blocks.0.txt_attn.qkv", 1),
    "transformer_blocks.0.attn.add_v_proj": ("double_blocks.0.txt_attn.qkv", 2),
    "transformer_blocks.0.attn.norm_q": ("double_blocks.0.img_attn.norm.query_norm", None),
    "transformer_blocks.0.attn.norm_k": ("double_blocks.0.img_attn.norm.key_norm", None),
    "transformer_blocks.0.attn.norm_added_q": ("double_blocks.0.txt_attn.norm.query_norm", None),
    "transformer_blocks.0.attn.norm_added_k": ("double_blocks.0.txt_attn.norm.key_norm", None),
    "transformer_blocks.0.attn.to_out.0": ("double_blocks.0.img_attn.proj", None),
    "transformer_blocks.0.attn.to_add_out": ("double_blocks.0.txt_attn.proj", None),
    "transformer_blocks.0.norm1.linear": ("double_blocks.0.img_mod.lin", None),
    "transformer_blocks.0.norm1_context.linear": ("double_blocks.0.txt_mod.lin", None),
    "transformer_blocks.0.ff.net.0.proj": ("double_blocks.0.img_mlp.0", None),
    "transformer_blocks.0.ff.net.2": ("double_blocks.0.img_mlp.2", None),
    "transformer_blocks.0.ff_context.net.0.proj": ("double_blocks.0.txt_mlp.0", None),
    "transformer_blocks.0.ff_context.net.2": ("double_blocks.0.txt_mlp.2", None),
    "single_transformer_blocks.0.attn.to_q": ("single_blocks.0.linear1", 0),
    "single_transformer_blocks.0.attn.to_k": ("single_blocks.0.linear1", 1),
    "single_transformer_blocks.0.attn.to_v": ("single_blocks.0.linear1", 2),
    "single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", 3),
    "single_transformer_blocks.0.attn.norm_q": ("single_blocks.0.norm.query_norm", None),
    "single_transformer_blocks.0.attn.norm_k": ("single_blocks.0.norm.key_norm", None),
    "single_transformer_blocks.0.proj_out": ("single_blocks.0.linear2", None),
    "single_transformer_blocks.0.norm.linear": ("single_blocks.0.modulation.lin", None),
    "x_embedder": ("img_in", None),
    "context_embedder": ("txt_in", None),
    "time_text_embed.timestep_embedder.linear_1": ("time_in.in_layer", None),
    "time_text_embed.timestep_embedder.linear_2": ("time_in.out_layer", None),
    "time_text_embed.text_embedder.linear_1": ("vector_in.in_layer", None),
    "time_text_embed.text_embedder.linear_2": ("vector_in.out_layer", None),
    "norm_out.linear": ("final_layer.adaLN_modulation.1", "swap"),
    "proj_out": ("final_layer.linear", None),
}


def swap(rows):
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def originals(checkpoint, table):
    """A model's weights under the names of ComfyUI's model, and by diffusers' name the rows that each leads to."""
    pieces, where = {}, {}
    for name in checkpoint.headers:
        module, _, leaf = name.rpartition(".")
        original, part = table[module]
        value = checkpoint.read(name).double()
        pieces.setdefault(f"{original}.{leaf}", {})[part] = swap(value) if part == "swap" else value
    made = {}
    for name, parts in pieces.items():
        at = 0
        for part in sorted(parts, key=str):
            where[name, part] = slice(at, at := at + len(parts[part]))
        made[name] = torch.cat([parts[part] for part in sorted(parts, key=str)])
    return made, where


def applied(file, base, table):
    """What ComfyUI makes of the base with a file; every key must be used."""
    tensors, used = load_file(file), set()
    weights, where = originals(base, table)
    keys = {f"transformer.{module}": (original, part) for module, (original, part) in table.items()}
    keys |= {
        f"diffusion_model.{name.removesuffix('.weight')}": (name.removesuffix(".weight"), None) for name in weights
    }
    for key, (original, part) in keys.items():
        whole = weights.get(f"{original}.weight")
        rows = where.get((f"{original}.weight", part), slice(None))
        if f"{key}.lora_up.weight" in tensors:
            up, down, alpha = (
                tensors[f"{key}.{end}"].double() for end in ("lora_up.weight", "lora_down.weight", "alpha")
            )
            delta = up @ down * (alpha / len(down))
            whole[rows] += swap(delta) if part == "swap" else delta
            used |= {f"{key}.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha")}
        if f"{key}.diff" in tensors and whole is not None:
            whole[rows] += tensors[f"{key}.diff"].double()
            used.add(f"{key}.diff")
        if f"{key}.diff_b" in tensors and part is None:  # Of a part no bias is found.
            weights[f"{original}.bias"] += tensors[f"{key}.diff_b"].double()
            used.add(f"{key}.diff_b")
    assert used == tensors.keys()
    return weights


def test_of_flux_comfyui_makes_the_fine_tune_norms_and_biases_included(tmp_path):
    base, tuned = save_pair(diffusion.flux(), tmp_path, "transformer", norms=True)
    extract(base, tuned, 256, dtype=torch.float32, form="peft").save(tmp_path / "a")
    file = tmp_path / "lora.safetensors"
    export(tmp_path / "a", file, "comfyui", base=base)
    made = applied(file, open_checkpoint(base), FLUX)
    wanted, _ = originals(open_checkpoint(tuned), FLUX)
    assert max((made[name] - wanted[name]).abs().max() for name in wanted) < 1e-5
    assert distance(f"{base}+{file}", tuned) < 1e-5


def test_of_wan_norms_biases_and_the_tables_that_no_module_has_are_read_and_written(tmp_path):
    model = small.make("WanTransformer3DModel")
    tables = {name: torch.randn_like(value) for name, value in model.named_parameters() if "scale_shift" in name}
    base, tuned = save_pair(model, tmp_path, "transformer", norms=True)
    extract(base, tuned, 256, dtype=torch.float32, form="peft", conv=True).save(tmp_path / "a")
    file = tmp_path / "lora.safetensors"
    export(tmp_path / "a", file, "comfyui", base=base)
    tensors = load_file(file)
    assert {"diffusion_model.blocks.0.norm3.diff", "diffusion_model.blocks.0.self_attn.norm_q.diff"} <= tensors.keys()
    names = {name: name.replace("scale_shift_table", "modulation") for name in tables}
    names["scale_shift_table"] = "head.modulation"
    wanted = {f"diffusion_model.{names[name]}.diff": value for name, value in tables.items()}
    save_file(tensors | wanted, tmp_path / "more.safetensors")
    export(tmp_path / "more.safetensors", tmp_path / "again.safetensors", "comfyui", base=base)
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[name], value) for name, value in wanted.items())
    both, after = open_checkpoint(f"{base}+{tmp_path / 'more.safetensors'}"), open_checkpoint(tuned)
    for name in both.headers:
        more = tables.get(name)
        expected = after.read(name) if more is None else open_checkpoint(base).read(name) + more
        torch.testing.assert_close(both.read(name), expected, rtol=1e-4, atol=1e-4)
