"""Adapters to smaller adapters: the best of a lower rank, whatever is in the file."""

import json
import re
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_posthoc
from peft_posthoc import (
    AdapterError,
    extract,
    keep_energy,
    resize,
    spectra,
    verify,
)
from peft_posthoc.adapters.reader import LoraFolder
from tests.make import models
from tests.make.adapters import LEAVES, Pixels, adapt, best, config_of, copy_of, deltas, same, with_adapter


@pytest.mark.parametrize("form", ["portable", "peft"])
def test_resized_deltas_are_the_best_of_their_rank_whatever_the_scale_was(llama, patterned, tmp_path, form):
    resize(patterned, 3, form=form).save(tmp_path / "out")
    before, after = deltas(models.load(llama), patterned), deltas(models.load(llama), tmp_path / "out")
    same(after, {name: best(delta, 3) for name, delta in before.items()})


def test_a_plain_adapter_becomes_a_portable_one(patterned, tmp_path):
    resize(patterned, 3).save(tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert not config.keys() & {"rank_pattern", "alpha_pattern", "use_rslora", "lora_bias"}
    assert config["target_modules"] == sorted(LEAVES)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors.keys() == load_file(patterned / "adapter_model.safetensors").keys()
    assert {min(tensor.shape) for tensor in tensors.values()} == {8}


def test_the_peft_form_keeps_true_ranks_and_a_rank_above_them_loses_nothing(llama, patterned, tmp_path):
    resized = resize(patterned, 1000, form="peft")
    resized.save(tmp_path / "out")
    assert {row.true_rank for row in resized.report.rows} == {4, 8, 12}
    assert all(row.rank == row.true_rank == row.rank_before and row.energy == 1 for row in resized.report.rows)
    same(deltas(models.load(llama), tmp_path / "out"), deltas(models.load(llama), patterned))


@pytest.mark.parametrize("form", ["portable", "peft"])
def test_resizing_again_changes_nothing(patterned, tmp_path, form):
    once = resize(patterned, 0.7, form=form)
    once.save(tmp_path / "once")
    twice = resize(tmp_path / "once", 1000, form=form)
    twice.save(tmp_path / "twice")
    # The padding of the portable form is no rank.
    assert [row.rank for row in twice.report.rows] == [row.rank for row in once.report.rows]
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("once", "twice"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], rtol=0, atol=1e-5 * float(tensor.abs().max()))


def test_energies_are_told_and_are_what_was_asked_for(llama, patterned, tmp_path):
    resized = resize(patterned, 0.8, form="peft")
    resized.save(tmp_path / "out")
    before, after = deltas(models.load(llama), patterned), deltas(models.load(llama), tmp_path / "out")
    for row in resized.report.rows:
        delta, kept = before[row.module], after[row.module]
        assert row.energy == pytest.approx(float((kept.norm() / delta.norm()) ** 2), abs=1e-5)
        assert row.relative_error == pytest.approx(float((delta - kept).norm() / delta.norm()), abs=1e-4)
        assert row.energy >= 0.8 > float((best(delta, row.rank - 1).norm() / delta.norm()) ** 2)
    total = sum(delta.norm() ** 2 for delta in before.values())
    kept = sum(delta.norm() ** 2 for delta in after.values())
    assert resized.report.totals.energy == pytest.approx(float(kept / total), abs=1e-5)


def test_ranks_chosen_from_all_spectra_at_once_are_taken(llama, patterned, tmp_path):
    found = spectra(patterned)
    before = deltas(models.load(llama), patterned)
    for name, delta in before.items():
        s = found[name].s
        assert torch.allclose(s, torch.linalg.svdvals(delta.double())[: len(s)], rtol=1e-4, atol=1e-6)
    # A rule that no layer can follow alone: what lies above one threshold for all.
    threshold = sorted(float(x) for one in found.values() for x in one.s)[-20]
    ranks = {name: max(int((one.s >= threshold).sum()), 1) for name, one in found.items()}
    assert {row.module: row.rank for row in resize(patterned, ranks, form="peft").report.rows} == ranks
    with pytest.raises(ValueError, match=r"No rank is given for `model\.layers\.0\.mlp\.down_proj`"):
        resize(patterned, {"model.layers.0.self_attn.q_proj": 2})
    with pytest.raises(ValueError, match=r"given for `nonsense`, which the adapter does not adapt"):
        resize(patterned, ranks | {"nonsense": 2})


EXTRACTIONS = {
    "llama": (models.llama, {}),
    "embeddings and head": (models.llama, {"embeddings": True, "head": True}),
    "gpt2": (models.gpt2, {}),
    "experts one by one": (models.mixtral, {"experts": "per-expert"}),
    "stacked experts": (models.mixtral, {"experts": "fused"}),
    "all that changed": (models.llama, {"form": "peft"}),
}


@pytest.mark.parametrize("case", EXTRACTIONS)
def test_an_extraction_cut_later_is_the_extraction_at_that_rank(tmp_path, case):
    make, how = EXTRACTIONS[case]
    pair = models.save_pair(make(), tmp_path)
    for rank in (7, 3):
        extract(*pair, rank, dtype=torch.float32, **how).save(tmp_path / str(rank))
    resized = resize(tmp_path / "7", 3, form=how.get("form"))
    resized.save(tmp_path / "out")
    assert max(row.rank_before for row in resized.report.rows) in (7, 8)  # padded in the portable form
    assert {row.true_rank for row in resized.report.rows} == {7}
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("3", "out"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        # Signs are fixed and the spectrum is shared out as extraction does: the factors themselves are the same.
        assert torch.allclose(tensor, other[name], rtol=0, atol=1e-4 * float(tensor.abs().max())), name
    known = config_of(tmp_path / "3")
    assert {**known, **config_of(tmp_path / "out")} == known
    assert verify(tmp_path / "out", *pair, outputs=False).cosine == pytest.approx(
        verify(tmp_path / "3", *pair, outputs=False).cosine, abs=1e-6
    )


def test_the_page_s_python_runs_as_printed(patterned, tmp_path, monkeypatch):
    for name in ("adapter", "a", "b"):
        shutil.copytree(patterned, tmp_path / "page" / name)
    monkeypatch.chdir(tmp_path / "page")
    page = (Path(__file__).parents[2] / "docs" / "resize.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    assert {path.name for path in Path().iterdir()} == {"adapter", "a", "b", "smaller", "by-threshold", "mix"}


def test_a_layer_without_a_delta_stays_in_the_file_as_zeros(llama, patterned, tmp_path):
    weights = load_file(patterned / "adapter_model.safetensors")
    weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].zero_()
    save_file(weights, patterned / "adapter_model.safetensors", metadata={"format": "pt"})
    for form in ("portable", "peft"):
        resized = resize(patterned, 2, form=form)
        resized.save(tmp_path / form)
        assert not deltas(models.load(llama), tmp_path / form)["model.layers.0.self_attn.q_proj"].any()
        (row,) = [row for row in resized.report.rows if row.delta_norm == 0]
        assert (row.module, row.rank, row.true_rank, row.energy) == ("model.layers.0.self_attn.q_proj", 0, 0, None)
        assert (resized.report.totals.zero, resized.report.totals.modules) == (1, 8)


def test_embeddings_and_head_are_resized_and_the_base_s_own_weights_beside_them_carried_along(llama, tmp_path):
    how = {"r": 6, "lora_alpha": 9, "use_rslora": True, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    source = adapt(models.load(llama), tmp_path / "a", **how)
    resized = resize(source, 2)
    resized.save(tmp_path / "out")
    # PEFT saves `embed_tokens.base_layer.weight` too; that has no place in the portable form.
    assert (resized.form, resized.report.totals.whole) == ("peft", 2)
    before, after = deltas(models.load(llama), source), deltas(models.load(llama), tmp_path / "out")
    assert before["model.embed_tokens"].shape == (96, 32)
    same(after, {name: best(delta, 2) for name, delta in before.items()})


def test_conv1d_of_gpt2_is_resized(tmp_path):
    base = models.save(models.gpt2(), tmp_path / "base")
    source = adapt(models.load(base), tmp_path / "a", r=6, lora_alpha=9, target_modules=["c_attn"], fan_in_fan_out=True)
    resize(source, 2).save(tmp_path / "out")
    before, after = deltas(models.load(base), source), deltas(models.load(base), tmp_path / "out")
    same(after, {name: best(delta, 2) for name, delta in before.items()})


def test_convolutions_are_resized_as_matrices_over_the_kernel(tmp_path):
    source = adapt(Pixels(), tmp_path / "a", r=8, lora_alpha=12, target_modules=["first", "second", "last"])
    before = deltas(Pixels(), source)
    assert before["first"].shape == (16, 3, 3, 3)
    for form in ("portable", "peft"):
        resize(source, 2, form=form).save(tmp_path / form)
        same(deltas(Pixels(), tmp_path / form), {name: best(delta, 2) for name, delta in before.items()})


def test_what_is_whole_and_lora_s_biases_come_along(tmp_path):
    how = {"r": 8, "lora_alpha": 20, "lora_bias": True, "target_modules": ["first"], "modules_to_save": ["last"]}
    source = adapt(Pixels(), tmp_path / "a", **how)
    resize(source, 1000).save(tmp_path / "out")
    torch.manual_seed(0)
    model, x = Pixels(), torch.randn(4, 3, 9, 9)
    merged = [with_adapter(copy_of(model), folder).merge_and_unload() for folder in (source, tmp_path / "out")]
    assert torch.allclose(merged[0](x), merged[1](x), atol=1e-5)
    assert not torch.allclose(merged[0].first.bias, model.first.bias, atol=1e-3)
    assert not torch.allclose(merged[0](x), model(x), atol=1e-2)


def moe(tmp_path):
    return models.save(models.qwen3_moe(num_experts=3), tmp_path / "base")


FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(("rank", "form"), [(2, "portable"), (0.6, "peft")])
def test_stacked_experts_are_resized_one_by_one(tmp_path, rank, form):
    base = moe(tmp_path)
    how = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj"], "target_parameters": FUSED}
    source = adapt(models.load(base), tmp_path / "a", **how)
    resized = resize(source, rank, form=form)
    resized.save(tmp_path / "out")
    ranks = {row.module: row.rank for row in resized.report.rows}
    before, after = (deltas(models.load(base), folder) for folder in (source, tmp_path / "out"))
    assert before["model.layers.0.mlp.experts"].shape[0] == 3
    same(after, {name: best(delta, ranks[name]) for name, delta in before.items()})
    assert set(spectra(source)) >= {f"model.layers.1.mlp.experts.base_layer[{e}]" for e in range(3)}


def test_stacked_experts_whose_ranks_a_pattern_tells_apart_are_refused(tmp_path):
    how = {"r": 6, "target_modules": ["q_proj"], "target_parameters": FUSED, "rank_pattern": {"down_proj": 3}}
    source = adapt(models.qwen3_moe(), tmp_path / "a", **how)
    with pytest.raises(AdapterError, match="which of its tensors belong to which only the model can tell"):
        resize(source)


def test_experts_one_by_one_are_of_one_rank_for_the_loader_that_stacks_them(tmp_path):
    base = moe(tmp_path)
    weights, draw = {}, torch.Generator().manual_seed(0)
    for layer in range(2):
        for expert in range(3):
            for leaf, (m, n) in {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}.items():
                stem = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{leaf}"
                weights[f"{stem}.lora_A.weight"] = torch.randn(6, n, generator=draw) * 2.0**-expert
                weights[f"{stem}.lora_B.weight"] = torch.randn(m, 6, generator=draw) * 3 ** -torch.arange(6.0)
    (tmp_path / "a").mkdir()
    save_file(weights, tmp_path / "a" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": 6, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    before = stacked(base, tmp_path / "a")
    for form in ("portable", "peft"):
        # The last expert would need one triplet less by itself.
        ranks = {name: 1 if "experts.2." in name else 2 for name in spectra(tmp_path / "a")}
        resize(tmp_path / "a", ranks, form=form).save(tmp_path / form)
        one = load_file(tmp_path / form / "adapter_model.safetensors")
        assert {len(tensor) for name, tensor in one.items() if "lora_A" in name} == {config_of(tmp_path / form)["r"]}
        after = stacked(base, tmp_path / form)
        assert before["model.layers.0.mlp.experts"].shape == (3, 32, 16)
        for name, delta in before.items():
            halves = zip(after[name].chunk(2, dim=1), delta.chunk(2, dim=1), strict=True)
            pairs = halves if name.endswith("base_layer") else [(after[name], delta)]
            for found, wanted in pairs:  # gate and up are factored apart, and stacked when they are loaded
                wanted = torch.cat([best(wanted[:2], 2), best(wanted[2:], 1)])
                assert torch.allclose(found.double(), wanted, atol=1e-5 * float(delta.norm()))


def stacked(base, folder):
    """What PEFT adds to stacked experts from an adapter of single ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return models.lora_deltas(peft.PeftModel.from_pretrained(models.load(base), folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_keep_their_dtype_and_the_rounding_is_all_that_is_lost(llama, tmp_path, dtype):
    source = adapt(models.load(llama), tmp_path / "a", r=8, target_modules=["q_proj"])
    weights = {name: one.to(dtype) for name, one in load_file(source / "adapter_model.safetensors").items()}
    save_file(weights, source / "adapter_model.safetensors", metadata={"format": "pt"})
    resize(source, 1000).save(tmp_path / "out")
    assert {one.dtype for one in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {dtype}
    before, after = deltas(models.load(llama), source), deltas(models.load(llama), tmp_path / "out")
    same(after, before, tolerance=4 * max(torch.finfo(dtype).eps, 1e-7))


def test_layers_that_a_filter_chose_are_named_in_full(llama, tmp_path):
    how = {"r": 8, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    source = adapt(models.load(llama), tmp_path / "a", **how)
    regex = adapt(models.load(llama), tmp_path / "b", r=8, target_modules=r".*layers\.0\.self_attn\.[vq]_proj")
    names = [f"model.layers.1.self_attn.{leaf}" for leaf in ("o_proj", "q_proj")]
    for folder, wanted in (
        (source, names),
        (regex, [f"model.layers.0.self_attn.{leaf}" for leaf in ("q_proj", "v_proj")]),
    ):
        resize(folder, 2).save(tmp_path / "out", force=True)
        assert config_of(tmp_path / "out")["target_modules"] == wanted
        before, after = deltas(models.load(llama), folder), deltas(models.load(llama), tmp_path / "out")
        same(after, {name: best(delta, 2) for name, delta in before.items()})


def test_the_same_input_gives_the_same_bits_with_any_number_of_threads(patterned, tmp_path):
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            resize(patterned, 2).save(tmp_path / str(count))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("1", "3"))
    assert one == other


def test_tensors_are_read_one_module_at_a_time(patterned, monkeypatch):
    held, most = [], []
    read, cut = LoraFolder.factors, peft_posthoc.linalg.product.Product.cut

    def factors(folder, name):
        held.append(name)
        most.append(len(held))
        return read(folder, name)

    def done(product, rank):
        held.pop()
        return cut(product, rank)

    monkeypatch.setattr(LoraFolder, "factors", factors)
    monkeypatch.setattr(peft_posthoc.linalg.product.Product, "cut", done)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        resize(patterned, keep_energy(0.5))
    finally:
        torch.set_num_threads(threads)
    assert max(most) <= 2 < len(most)
