"""Models that were compiled: `torch.compile(module)` is a module of its own, and its name goes into theirs."""

import copy
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from peft_posthoc import CheckpointError, extract, open_checkpoint, verify
from peft_posthoc.checkpoints.memory import InMemory
from tests.make import models
from tests.make.same import same


@pytest.fixture(autouse=True)
def compiles(monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")


def compiled_whole(model):
    # Nothing is run, so nothing is compiled; to import torch's own backend takes seconds.
    return torch.compile(model, backend="eager")


def compiled_layers(model):
    layers = model.transformer.h
    for i, layer in enumerate(layers):
        layers[i] = compiled_whole(layer)
    return model


def compiled_twice_over(model):
    return compiled_whole(compiled_layers(model))


def named_as_saved(model):
    """What `torch.save(model.state_dict())` and its kin would name them; a tied weight under one name."""
    tensors = InMemory(model.state_dict(), label="")
    return {name: tensors.read(name).clone() for name in tensors.headers}


def as_module(model, where):
    return model


def as_state_dict(model, where):
    return model.state_dict()


def as_safetensors(model, where):
    where.mkdir()
    save_file(named_as_saved(model), where / "model.safetensors")
    model.config.save_pretrained(where)
    return where


def as_shards(model, where):
    with warnings.catch_warnings():
        # That this is one process is what torch warns of.
        warnings.simplefilter("ignore")
        dcp.save({"model": named_as_saved(model)}, checkpoint_id=where / "pytorch_model_fsdp_0", no_dist=True)
    return where


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_layers, compiled_twice_over])
@pytest.mark.parametrize("give", [as_module, as_state_dict, as_safetensors, as_shards])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_compiled_model_gives_what_it_gives_without(side, give, compiled, tmp_path):
    base = models.gpt2()
    tuned = models.tuned_from(base)
    # Of GPT-2, only its class or its configuration tells how weights are stored.
    base.config.architectures = ["GPT2LMHeadModel"]
    expected = extract(models.save(base, tmp_path / "base"), models.save(tuned, tmp_path / "tuned"), 4).factors
    assert len(expected) == 8
    plain = {"base": tmp_path / "base", "tuned": tmp_path / "tuned"}
    model = compiled(base if side == "base" else tuned)
    assert any("_orig_mod." in name for name in model.state_dict())
    factors = extract(**{**plain, side: give(model, tmp_path / "compiled")}, rank=4).factors
    assert factors.keys() == expected.keys()
    for module, (a, b) in expected.items():
        assert torch.equal(factors[module][0], a), module
        assert torch.equal(factors[module][1], b), module


def test_a_live_compiled_model_is_asked_for_its_kinds_of_layers():
    # Without a configuration, names alone would not do.
    base = models.gpt2()
    tuned = models.tuned_from(base)
    expected = extract(base, tuned, 4).factors
    live = open_checkpoint(compiled_twice_over(copy.deepcopy(base)))
    assert same(live, named_as_saved(base))
    assert not any("_orig_mod" in name for name, _ in live.module.named_modules())
    assert live.module.get_output_embeddings() is live.module.lm_head
    assert extract(live, tuned.state_dict(), 4).factors.keys() == expected.keys()


def test_to_look_into_a_compiled_model_does_not_change_it():
    model = compiled_twice_over(models.gpt2())
    before = dict(model.named_modules())
    open_checkpoint(model)
    assert dict(model.named_modules()) == before
    plain = models.gpt2()
    assert open_checkpoint(plain).module is plain


def test_only_a_whole_part_of_a_name_is_that_of_a_compiled_module(weights):
    odd = {"my_orig_mod.weight": torch.ones(2), "_orig_mods.weight": torch.ones(3), **weights}
    assert same(open_checkpoint(odd), odd)
    renamed = open_checkpoint({"a._orig_mod.b._orig_mod.weight": torch.ones(2), "_orig_mod.c": torch.ones(3)})
    assert same(renamed, {"a.b.weight": torch.ones(2), "c": torch.ones(3)})
    assert renamed.label == "state dict"
    assert open_checkpoint(renamed) is renamed


def test_one_weight_with_and_without_the_name_of_a_compiled_module_is_an_error(tmp_path):
    save_file({"a._orig_mod.weight": torch.ones(2), "a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds both `a\..*weight` and `a\..*weight`.*torch\.compile"):
        open_checkpoint(tmp_path)


def test_a_folder_of_a_compiled_model_is_not_loaded_as_a_model(tmp_path):
    base, tuned = models.save_pair(models.llama(), tmp_path)
    kept = {f"_orig_mod.{name}": tensor for name, tensor in load_file(tmp_path / "tuned/model.safetensors").items()}
    extract(base, tuned, 4).save(tmp_path / "lora")
    whole = verify(tmp_path / "lora", base, tuned)
    save_file(kept, tmp_path / "tuned/model.safetensors")
    found = verify(tmp_path / "lora", base, tuned)
    assert whole.adapter is not None
    # transformers would take none of its weights, and give random ones.
    assert found.adapter is None
    assert found.cosine == whole.cosine


@pytest.mark.parametrize("side", [0, 1])
def test_a_tied_weight_that_a_folder_stores_under_both_its_names_is_one(side, tied_pair, tmp_path):
    folders = list(tied_pair)
    tensors = load_file(f"{folders[side]}/model.safetensors")
    shutil.copytree(folders[side], tmp_path / "both")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "both" / "model.safetensors")
    folders[side] = tmp_path / "both"
    expected, found = (extract(*pair, 4, form="peft") for pair in (tied_pair, folders))
    assert [(row.weight, row.status, row.modules) for row in found.report.rows] == [
        (row.weight, row.status, row.modules) for row in expected.report.rows
    ]
    assert found.report.totals.energy_of_all == expected.report.totals.energy_of_all
