"""Modules and state dicts as checkpoints, and what is no source."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from peft_posthoc import CheckpointError, extract, open_checkpoint
from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.memory import InMemory
from tests.make import models
from tests.make.same import same


def test_a_module_gives_its_parameters_and_its_saved_buffers(weights):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 6)
            self.register_buffer("mean", torch.randn(6))
            self.register_buffer("scratch", torch.randn(6), persistent=False)

    block = Block()
    checkpoint = open_checkpoint(block)
    assert same(checkpoint, dict(block.state_dict()))
    assert "scratch" not in checkpoint.headers
    assert checkpoint.module is block
    assert checkpoint.label == "Block"
    assert checkpoint.config is checkpoint.folder is checkpoint.revision is None


def test_a_module_gives_a_tied_weight_once_as_its_saved_folder_does(tmp_path):
    model = models.llama(tie_word_embeddings=True)
    models.save(model, tmp_path)
    live, saved = open_checkpoint(model), open_checkpoint(tmp_path)
    assert "lm_head.weight" in model.state_dict()
    assert "lm_head.weight" not in live.headers
    assert live.headers == saved.headers
    assert live.config["tie_word_embeddings"] is True
    assert same(live, {name: saved.read(name) for name in saved.headers})


def test_tensors_of_a_live_model_are_not_copied():
    layer = nn.Linear(4, 6)
    for source in (layer, layer.state_dict()):
        assert open_checkpoint(source).read("weight").data_ptr() == layer.weight.data_ptr()


def test_a_state_dict_is_a_source(weights):
    checkpoint = open_checkpoint(weights)
    assert same(checkpoint, weights)
    assert checkpoint.label == "state dict"
    assert checkpoint.module is checkpoint.folder is checkpoint.config is None


def test_every_kind_of_source_gives_the_same_factors(tmp_path):
    model = models.llama()
    tuned = models.tuned_from(model)
    models.save(model, tmp_path / "base")
    models.save(tuned, tmp_path / "tuned", max_shard_size="20KB")
    pairs = {
        "folders": (tmp_path / "base", str(tmp_path / "tuned")),
        "modules": (model, tuned),
        "folder and state dict": (tmp_path / "base", tuned.state_dict()),
        "module and checkpoint": (model, open_checkpoint(tmp_path / "tuned")),
    }
    expected = extract(*pairs.pop("folders"), 4).factors
    assert len(expected) == 14
    for kind, pair in pairs.items():
        factors = extract(*pair, 4).factors
        assert factors.keys() == expected.keys(), kind
        for module, (a, b) in expected.items():
            assert torch.equal(factors[module][0], a), (kind, module)
            assert torch.equal(factors[module][1], b), (kind, module)


def test_a_peft_model_is_refused_until_it_is_merged():
    model = models.llama()
    plain = copy.deepcopy(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        open_checkpoint(wrapped)
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        open_checkpoint(wrapped.get_base_model())
    assert same(open_checkpoint(wrapped.merge_and_unload()), dict(plain.state_dict()))


def test_a_checkpoint_object_passes_through(weights):
    class Renamed(Checkpoint):
        label = "mine"

        @property
        def headers(self):
            return {f"model.{name}": Header(tuple(t.shape), t.dtype) for name, t in weights.items()}

        def read(self, name):
            return weights[name.removeprefix("model.")]

    mine = Renamed()
    assert open_checkpoint(mine) is mine
    live = InMemory(weights, label="live")
    assert open_checkpoint(live) is live


@pytest.mark.parametrize("kind", ["folder", "module", "state dict", "checkpoint"])
def test_only_a_hub_id_has_a_revision(kind, weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    sources = {
        "folder": tmp_path,
        "module": nn.Linear(2, 2),
        "state dict": weights,
        "checkpoint": open_checkpoint(weights),
    }
    with pytest.raises(ValueError, match=r"'v1'.*hub id; the base"):
        open_checkpoint(sources[kind], revision="v1", role="base")


def test_a_state_dict_with_something_else_in_it_is_refused(weights):
    with pytest.raises(CheckpointError, match="tuned state dict holds values that are no tensors: epoch, optimizer"):
        open_checkpoint({**weights, "epoch": 3, "optimizer": {}}, role="tuned")


@pytest.mark.parametrize("nothing", [{}, nn.Identity()])
def test_a_source_without_tensors_is_refused(nothing):
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_checkpoint(nothing)


@pytest.mark.parametrize("stranger", [None, 3, [torch.zeros(2, 2)], b"folder"])
def test_anything_else_is_a_type_error_that_names_what_came(stranger):
    with pytest.raises(TypeError, match=f"The base must be .* Got {type(stranger).__name__}"):
        open_checkpoint(stranger, role="base")


def test_a_model_without_values_is_refused_when_it_is_read():
    with torch.device("meta"):
        model = models.llama()
    checkpoint = open_checkpoint(model)
    assert checkpoint.headers["lm_head.weight"].shape == (96, 32)
    with pytest.raises(CheckpointError, match=r"`lm_head\.weight` of the LlamaForCausalLM is on the meta device"):
        checkpoint.read("lm_head.weight")
    with pytest.raises(CheckpointError, match="meta device"):
        extract(model, models.llama())


def test_a_file_that_was_replaced_after_it_was_opened_is_not_read(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    save_file({"w": torch.zeros(3)}, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors` changed while it was read"):
        checkpoint.read("w")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_file_is_mapped_no_longer_than_its_tensors_are_held(tmp_path):
    save_file({"w": torch.ones(3), "v": torch.ones(3)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    held = checkpoint.read("w")
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del held
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
