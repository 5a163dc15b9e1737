"""Shards that one process wrote."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_posthoc import CheckpointError, extract, open_checkpoint, verify
from tests.make import models
from tests.make.same import same
from tests.make.shards import SHARDS, save, trained
from tests.make.spoiled import moved, tensors


@pytest.mark.parametrize("wrap", [lambda weights: weights, lambda weights: {"model": weights}])
def test_tensors_of_every_type_come_out_as_they_were_saved(wrap, weights, tmp_path):
    shards = save(wrap(weights), tmp_path / "shards")
    assert same(open_checkpoint(shards), weights)


def test_what_is_no_tensor_is_passed_over(weights, tmp_path):
    shards = save({"model": {**weights, "extra_state": {"steps": 3, "names": ["a"]}}, "epoch": 2}, tmp_path / "shards")
    assert same(open_checkpoint(shards), weights)


def test_a_bare_state_dict_keeps_its_names_though_all_begin_with_model(tmp_path):
    bare = {f"model.{name}": weight for name, weight in tensors().items()}
    assert same(open_checkpoint(save(bare, tmp_path / "bare")), bare)
    assert same(open_checkpoint(save({"model": bare}, tmp_path / "wrapped")), bare)
    other = {**bare, "lm_head.weight": torch.randn(3, 3)}
    assert same(open_checkpoint(save(other, tmp_path / "other")), other)


def test_of_a_model_saved_beside_its_optimizer_the_model_is_read(tmp_path):
    state = {"model": tensors(), "optimizer": {"state": moved(tensors())}, "rng": torch.arange(5), "step": 7}
    assert same(open_checkpoint(save(state, tmp_path / "shards")), tensors())


def test_shards_are_found_beside_an_optimizer_and_not_taken_before_safetensors(tmp_path):
    where = trained(tmp_path / "checkpoint-3", tensors())
    assert same(open_checkpoint(where), tensors())
    save_file({"other": torch.ones(3)}, where / "model.safetensors")
    assert same(open_checkpoint(where), {"other": torch.ones(3)})
    (where / "model.safetensors").unlink()
    shutil.rmtree(where / SHARDS)
    with pytest.raises(CheckpointError, match=r"No weights in .*optimizer_0"):
        open_checkpoint(where)


def test_of_several_models_none_is_chosen(tmp_path):
    where = trained(tmp_path / "checkpoint-3", tensors())
    save({"model": moved(tensors())}, where / "pytorch_model_fsdp_1")
    with pytest.raises(CheckpointError, match=r"several sharded models \(pytorch_model_fsdp_0, pytorch_model_fsdp_1\)"):
        open_checkpoint(where)
    assert same(open_checkpoint(where / "pytorch_model_fsdp_1"), moved(tensors()))


def test_the_configuration_lies_in_the_given_folder_or_beside_the_shards(tmp_path, monkeypatch):
    where = trained(tmp_path / "checkpoint-3", tensors())
    assert open_checkpoint(where).config is None
    assert open_checkpoint(where / SHARDS).config is None
    (tmp_path / "config.json").write_text('{"model_type": "stranger"}')
    (where / "config.json").write_text('{"model_type": "mine"}')
    assert open_checkpoint(where).config == {"model_type": "mine"}
    assert open_checkpoint(where / SHARDS).config == {"model_type": "mine"}
    monkeypatch.chdir(where / SHARDS)
    assert open_checkpoint(".").config == {"model_type": "mine"}
    (where / "config.json").unlink()
    monkeypatch.chdir(where)
    assert open_checkpoint(".").config is None


def test_the_identity_is_plain_and_changes_with_a_shard(tmp_path):
    where = trained(tmp_path / "checkpoint-3", tensors())
    before = open_checkpoint(where).identity
    assert json.loads(json.dumps(before)) == before == open_checkpoint(where / SHARDS).identity
    assert {file for _, file, _, _ in before} == {".metadata", "__0_0.distcp"}
    os.utime(where / SHARDS / "__0_0.distcp", ns=(1, 1))
    assert open_checkpoint(where).identity != before


def test_a_shard_that_was_replaced_after_it_was_opened_is_not_read(tmp_path):
    shards = save({"w": torch.ones(3)}, tmp_path / "shards")
    checkpoint = open_checkpoint(shards)
    save({"w": torch.zeros(3)}, tmp_path / "new")
    (tmp_path / "new" / "__0_0.distcp").replace(shards / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"__0_0.distcp` changed while it was read"):
        checkpoint.read("w")


def test_verify_compares_the_weights_of_shards_and_says_that_no_outputs_are_compared(llama_pair, tmp_path):
    base, tuned = llama_pair
    where = trained(tmp_path / "checkpoint-3", dict(models.load(tuned).state_dict()))
    shutil.copy(Path(tuned) / "config.json", where)
    extract(base, where, 4).save(tmp_path / "lora")
    found = verify(tmp_path / "lora", base, where)
    assert found.cosine == verify(tmp_path / "lora", base, tuned, outputs=False).cosine > 0.3
    assert found.adapter is None
    assert "only checkpoints in folders" in found.outputs_note


@pytest.mark.parametrize("read", [True, False])
def test_nothing_of_torch_distributed_checkpoint_is_needed(read, tmp_path):
    shards = save(tensors(), tmp_path / "shards")
    by_torch = "import torch.distributed.checkpoint as d; d.FileSystemReader(sys.argv[1]).read_metadata()"
    by_us = "import peft_posthoc as p; c = p.open_checkpoint(sys.argv[1]); [c.read(name) for name in c.headers]"
    code = f"import sys; {by_us if read else by_torch}; print('torch.distributed.checkpoint.metadata' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, shards], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(not read)
