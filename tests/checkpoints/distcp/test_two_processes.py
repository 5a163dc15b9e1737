"""Sharded training checkpoints (torch.distributed.checkpoint) that two processes wrote."""

import os
import pickle

import pytest
import torch

from peft_posthoc import CheckpointError, extract, open_checkpoint
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.sources import open_pair
from tests.make import models
from tests.make.same import same
from tests.make.shards import SHARDS, save
from tests.make.spoiled import moved


def test_tensors_that_two_processes_hold_halves_of_come_out_whole(place):
    shards = place / "checkpoint-3" / SHARDS
    assert sorted(os.listdir(place / "checkpoint-3")) == [SHARDS]
    assert sorted(os.listdir(shards)) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    assert {len(entry.chunks) for entry in metadata.state_dict_metadata.values()} == {2}
    assert all(name.startswith("model.") for name in metadata.state_dict_metadata)
    checkpoint = open_checkpoint(place / "checkpoint-3")
    assert isinstance(checkpoint, Checkpoint)
    assert same(checkpoint, dict(models.load(place / "tuned").state_dict()))
    assert checkpoint.label == str(place / "checkpoint-3")
    assert checkpoint.revision is checkpoint.module is checkpoint.config is checkpoint.folder is None


@pytest.mark.parametrize("given", ["checkpoint-3", f"checkpoint-3/{SHARDS}"])
@pytest.mark.parametrize("flags", [{}, {"embeddings": True, "head": True}])
def test_the_adapter_from_shards_is_that_from_safetensors(given, flags, place):
    expected = extract(place / "base", place / "tuned", 4, **flags)
    found = extract(place / "base", place / given, 4, **flags)
    assert len(expected.factors) >= 14
    assert found.factors.keys() == expected.factors.keys()
    for module, (a, b) in expected.factors.items():
        assert torch.equal(found.factors[module][0], a), module
        assert torch.equal(found.factors[module][1], b), module
    assert [row.weight for row in found.report.rows] == [row.weight for row in expected.report.rows]


def test_a_tied_weight_is_stored_twice_and_taken_once(from_two_processes):
    place = from_two_processes["tied head"]
    assert "lm_head.weight" in open_checkpoint(place / "checkpoint-3").headers
    base, tuned = open_pair(place / "base", place / "checkpoint-3")
    assert tuned.headers.keys() == base.headers.keys()
    assert "lm_head.weight" not in tuned.headers


def test_a_head_that_is_no_longer_the_embeddings_is_kept(tmp_path):
    base = {"embed.weight": torch.randn(9, 4), "layer.weight": torch.randn(4, 4), "norm.weight": torch.ones(4)}
    tuned = moved(base) | {"norm.weight": torch.ones(4), "norm2.weight": torch.ones(4)}
    for head, kept in ((tuned["embed.weight"] + 1, True), (tuned["embed.weight"].clone(), False)):
        shards = save({"model": tuned | {"head.weight": head}}, tmp_path / str(kept))
        _, found = open_pair(base, shards)
        assert ("head.weight" in found.headers) == kept
        # Vectors of ones are equal without being one.
        assert "norm2.weight" in found.headers


def test_shards_serve_as_a_base_too(place):
    found = extract(place / "checkpoint-3", place / "base", 4).factors
    expected = extract(place / "tuned", place / "base", 4).factors
    assert len(expected) == 14
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, y) for name in expected for x, y in zip(found[name], expected[name], strict=True))


@pytest.mark.parametrize("missing", [["__1_0.distcp"], ["__0_0.distcp", "__1_0.distcp"]])
def test_shards_that_another_node_kept_are_named(missing, place):
    for name in missing:
        (place / "checkpoint-3" / SHARDS / name).unlink()
    with pytest.raises(CheckpointError, match=rf"lacks shards .*: {', '.join(missing)}\. If each node"):
        open_checkpoint(place / "checkpoint-3")
