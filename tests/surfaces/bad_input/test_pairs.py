"""Two checkpoints that do not belong together."""

import torch
from safetensors.torch import save_file

from tests.make import models
from tests.make.spoiled import (
    NAMES,
    contents,
    moved,
    refused,
    run,
    tensors,
)


def test_the_probe_sees_an_svd(no_svd, work):
    refused(run("extract", "base", "tuned", "out"), "an SVD was started")


def test_all_weights_of_other_shapes_are_named_before_any_svd(no_svd, work):
    weights = moved(tensors())
    weights[NAMES[1]] = torch.zeros(16, 25)
    weights[NAMES[2]] = torch.zeros(17)
    save_file(weights, work / "tuned" / "model.safetensors")
    before = contents(work)
    line = refused(
        run("extract", "base", "tuned", "out"),
        f"`{NAMES[1]}` [16, 24] against [16, 25]",
        f"`{NAMES[2]}` [16] against [17]",
        "2 tensors",
        "--exclude",
    )
    assert NAMES[0] not in line
    assert contents(work) == before


def test_two_architectures_are_told_apart_by_their_configurations(no_svd, llama_pair, work):
    models.save(models.gpt2(), work / "gpt2")
    before = contents(work)
    refused(run("extract", llama_pair[0], "gpt2", "out"), "llama", "gpt2", llama_pair[0], "Two different architectures")
    assert contents(work) == before


def test_two_architectures_are_told_apart_by_their_names(no_svd, llama_pair, work):
    models.save(models.gpt2(), work / "gpt2")
    (work / "gpt2" / "config.json").unlink()
    before = contents(work)
    refused(run("extract", llama_pair[0], "gpt2", "out"), "no tensor name in common", "model.", "transformer.")
    assert contents(work) == before


def test_two_equal_checkpoints_hold_nothing_to_extract(no_svd, work):
    before = contents(work)
    refused(run("extract", "base", "base", "out"), "`base` and `base` hold the same weights", "nothing to extract")
    assert contents(work) == before


def test_where_only_what_is_not_carried_changed_it_is_named(no_svd, work):
    save_file({**tensors(), NAMES[2]: torch.ones(16)}, work / "tuned" / "model.safetensors")
    before = contents(work)
    refused(run("extract", "base", "tuned", "out"), "No weight that is carried differs", f"`{NAMES[2]}`", "norm")
    assert contents(work) == before


def test_where_nothing_can_be_carried_the_reason_is_told(no_svd, work):
    for side in ("base", "tuned"):
        save_file({NAMES[2]: torch.randn(16)}, work / side / "model.safetensors")
    before = contents(work)
    refused(run("extract", "base", "tuned", "out"), "No weight of `base` and `tuned` can be carried", "norm")
    assert contents(work) == before
