"""Sums of adapters."""

import json

import pytest
import torch
from safetensors.torch import load_file

from peft_posthoc import (
    MismatchError,
    NothingToCarryError,
    combine,
    resize,
)
from tests.make import models
from tests.make.adapters import Pixels, adapt, best, config_of, copy_of, deltas, same, with_adapter


def test_a_sum_of_adapters_is_the_weighted_sum_of_what_each_adds(llama, patterned, tmp_path):
    other = adapt(models.load(llama), tmp_path / "b", r=4, lora_alpha=7, target_modules=["q_proj", "up_proj"], seed=1)
    resized = combine([patterned, other], [0.7, -0.3])
    resized.save(tmp_path / "out")
    one, two = deltas(models.load(llama), patterned), deltas(models.load(llama), other)
    wanted = {
        name: 0.7 * one.get(name, torch.zeros(1)) - 0.3 * two.get(name, torch.zeros(1)) for name in one.keys() | two
    }
    same(deltas(models.load(llama), tmp_path / "out"), wanted)
    ranks = {row.module: row.rank for row in resized.report.rows}
    assert ranks["model.layers.0.self_attn.q_proj"] == 8
    assert ranks["model.layers.0.mlp.up_proj"] == 4
    combine([patterned, other], [0.7, -0.3], 2, form="peft").save(tmp_path / "cut")
    same(deltas(models.load(llama), tmp_path / "cut"), {name: best(delta, 2) for name, delta in wanted.items()})
    provenance = json.loads((tmp_path / "out" / "phlora_report.json").read_text())["provenance"]
    assert [(each["adapter"], each["weight"]) for each in provenance["adapters"]] == [
        (str(patterned), 0.7),
        (str(other), -0.3),
    ]


def test_combining_resized_halves_gives_the_whole_again(llama, patterned, tmp_path):
    combine([patterned, patterned], [0.25, 0.75], form="peft").save(tmp_path / "out")
    same(deltas(models.load(llama), tmp_path / "out"), deltas(models.load(llama), patterned))


def test_an_adapter_minus_itself_is_nothing_to_carry(patterned, tmp_path):
    with pytest.raises(NothingToCarryError, match="hold deltas that cancel"):
        combine([patterned, patterned], [1, -1])
    resize(patterned, 1000, form="peft", dtype=torch.float32).save(tmp_path / "same")
    with pytest.raises(NothingToCarryError, match="every delta is zero"):
        resize(adapt(models.llama(), tmp_path / "zero", size=0.0, target_modules=["q_proj"]))


def test_biases_add_up_by_weight(tmp_path):
    how = {"r": 4, "lora_bias": True, "target_modules": ["first"]}
    one, two = (adapt(Pixels(), tmp_path / str(seed), seed=seed, lora_alpha=8 + seed, **how) for seed in (1, 2))
    combine([one, two], [0.5, 2]).save(tmp_path / "out")
    model = Pixels()
    base = model.first.bias.detach().clone()
    moved = [
        with_adapter(copy_of(model), folder).merge_and_unload().first.bias.detach() - base
        for folder in (one, two, tmp_path / "out")
    ]
    assert torch.allclose(moved[2], 0.5 * moved[0] + 2 * moved[1], atol=1e-5)


def test_whole_tensors_are_kept_where_the_sum_is_known(tmp_path):
    one = adapt(Pixels(), tmp_path / "1", r=4, target_modules=["first"], modules_to_save=["last"])
    two = adapt(Pixels(), tmp_path / "2", r=4, target_modules=["first"], seed=1)
    other = adapt(Pixels(), tmp_path / "3", r=4, target_modules=["first"], modules_to_save=["last"], seed=2)
    combine([one, two], [1, 0.3]).save(tmp_path / "out")
    last = "base_model.model.last.weight"
    held = [load_file(folder / "adapter_model.safetensors")[last] for folder in (one, tmp_path / "out")]
    assert torch.equal(*held)
    assert config_of(tmp_path / "out")["modules_to_save"] == ["last"]
    assert torch.equal(combine([one, one], [0.4, 0.6]).whole[last], held[0])
    with pytest.raises(MismatchError, match=r"both hold `last\.(bias|weight)` whole, with other values"):
        combine([one, other], [0.5, 0.5])
    with pytest.raises(MismatchError, match=r"holds `last\.(bias|weight)` whole, and its weight is 0\.7"):
        combine([one, two], [0.7, 0.3])


def test_adapters_that_do_not_fit_are_told(patterned, tmp_path):
    other = adapt(models.llama(hidden_size=48), tmp_path / "b", target_modules=["q_proj"])
    with pytest.raises(MismatchError, match=r"q_proj` is linear 32 x 32 in .*linear 48 x 48 in .*not adapters of one"):
        combine([patterned, other])
    with pytest.raises(ValueError, match="2 adapters need as many weights"):
        combine([patterned, patterned], [1])
    with pytest.raises(ValueError, match="must be finite"):
        combine([patterned, patterned], [1, float("nan")])
    with pytest.raises(ValueError, match="at least one adapter"):
        combine([])
    with pytest.raises(ValueError, match="takes a list of folders"):
        combine("ab")
