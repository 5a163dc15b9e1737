"""Modules that SentenceTransformers keeps beside the model, which an adapter cannot hold, are told and counted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import CheckpointError, export, extract, open_checkpoint, verify
from tests.make import models


def with_dense(folder, weight):
    """What SentenceTransformers writes beside a model: a list of modules, and the weights of one of them."""
    listed = [{"idx": i, "name": str(i), "path": path} for i, path in enumerate(["", "1_Pooling", "2_Dense"])]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors")
    return folder


@pytest.fixture
def pair(tmp_path):
    folders = [Path(folder) for folder in models.save_pair(models.bert(), tmp_path)]
    weight = torch.randn(16, 32)
    return with_dense(folders[0], weight), with_dense(folders[1], weight + 0.1)


def energy(base, tuned):
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    return sum(float((after[name] - before[name]).double().norm()) ** 2 for name in before)


@pytest.mark.parametrize("form", ["portable", "peft"])
def test_they_are_rows_and_count_in_the_whole(form, pair):
    report = extract(*pair, 64, form=form).report
    (row,) = [row for row in report.rows if row.cause == "beside-model"]
    assert (row.weight, row.status) == ("2_Dense/linear.weight", "left out")
    assert "2_Dense" in row.reason
    lost = 16 * 32 * 0.1**2
    assert row.delta_norm**2 == pytest.approx(lost, rel=1e-4)
    whole = energy(*pair) + lost
    if form == "peft":
        assert report.totals.energy_of_all == pytest.approx(1 - lost / whole, rel=1e-4)
    shares = sum((row.delta_norm or 0) ** 2 for row in report.rows)
    assert shares == pytest.approx(whole, rel=1e-4)


def test_without_them_on_one_side_they_are_on_the_other_only(pair):
    shutil.rmtree(pair[0] / "2_Dense")
    causes = {row.weight: row.cause for row in extract(*pair, 4).report.rows}
    assert causes["2_Dense/linear.weight"] == "only-in-tuned"


def test_a_comparison_counts_them_and_a_merged_model_has_them_not(pair, tmp_path):
    adapter = extract(*pair, 64, form="peft").save(tmp_path / "adapter")
    found = verify(adapter, *pair, outputs=False)
    assert found.energy == pytest.approx(1 - 16 * 32 * 0.1**2 / (energy(*pair) + 16 * 32 * 0.1**2), rel=1e-4)
    export(adapter, tmp_path / "merged", "merged", base=pair[0])
    names = {name for path in (tmp_path / "merged").glob("*.safetensors") for name in load_file(path)}
    assert names == load_file(pair[0] / "model.safetensors").keys()
    assert names == open_checkpoint(pair[0]).headers.keys()


@pytest.mark.parametrize("listed", ['[{"path": "../elsewhere"}]', '[{"path": "/etc"}]', "{", '["2_Dense"]'])
def test_a_list_that_leads_elsewhere_or_is_none_is_refused(listed, pair):
    (pair[1] / "modules.json").write_text(listed)
    with pytest.raises(CheckpointError, match=r"modules\.json` (names the folder|is no list)"):
        extract(*pair, 4)
