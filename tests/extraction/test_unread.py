"""Buffers that older versions stored, in tuned alone: its class does not read them, and of the whole they are none."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import extract
from tests.make import models

MASK = torch.ones(1, 1, 32, 32).tril()
OLDER = {
    "gpt2": (models.gpt2, {"transformer.h.0.attn.bias": MASK}),
    "neox": (
        lambda: models.decoder("GPTNeoX"),
        {"gpt_neox.layers.0.attention.bias": MASK, "gpt_neox.layers.1.attention.masked_bias": torch.tensor(1.0)},
    ),
    "bert": (models.bert, {"embeddings.position_ids": torch.arange(32)[None]}),
}


@pytest.mark.parametrize("name", OLDER)
def test_a_buffer_that_an_older_version_stored_is_no_part_of_the_fine_tune(name, tmp_path):
    make, buffers = OLDER[name]
    base, tuned = models.save_pair(make(), tmp_path)
    plain = extract(base, tuned, 64, form="peft").report
    older = shutil.copytree(tuned, tmp_path / "older")
    file = older / "model.safetensors"
    save_file(load_file(file) | buffers, file, metadata={"format": "pt"})
    report = extract(base, older, 64, form="peft").report
    assert report.totals.energy_of_all == pytest.approx(plain.totals.energy_of_all, abs=1e-9)
    assert report.totals.unknown == 0
    assert {row.weight: row.cause for row in report.rows if row.weight in buffers} == dict.fromkeys(buffers, "unread")
    assert not any("only in tuned" in warning for warning in report.warnings)


def test_what_an_older_name_does_not_explain_still_counts(tmp_path):
    base, tuned = models.save_pair(models.gpt2(), tmp_path)
    file = shutil.copytree(tuned, tmp_path / "more") / "model.safetensors"
    save_file(load_file(file) | {"value.weight": MASK[0, 0]}, file, metadata={"format": "pt"})
    report = extract(base, file.parent, 64, form="peft").report
    assert {row.weight: row.cause for row in report.rows}["value.weight"] == "only-in-tuned"
    assert report.totals.unknown > 0
