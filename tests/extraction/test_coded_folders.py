"""Folders of quantised models from end to end: what was put on them is found, seen and verified."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import extract, inspect, open_checkpoint, preflight, verify
from tests.make import coded_folders, models

RANK = 8


@pytest.fixture(scope="module", params=[coded_folders.fp8_blocks, coded_folders.nvfp4, coded_folders.int4])
def pair(request, tmp_path_factory):
    """A quantised model, some layers of which are plain, in two shards; and what it computes with a delta on it."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("pair")
    plain = models.save(models.llama(hidden_size=64, intermediate_size=80, num_hidden_layers=2), where / "plain")
    base = Path(coded_folders.quantise(plain, where / "base", request.param, but=("layers.1.self_attn",)))
    in_two(base)
    decoded = open_checkpoint(base)
    tuned = {name: decoded.read(name).float() for name in decoded.headers}
    for name, value in tuned.items():
        if "mlp" in name:
            tuned[name] = value + torch.randn(len(value), RANK) @ torch.randn(RANK, value.shape[1]) / 20
    (where / "tuned").mkdir()
    save_file(tuned, where / "tuned/model.safetensors", {"format": "pt"})
    (where / "tuned/config.json").write_bytes((Path(plain) / "config.json").read_bytes())
    return base, where / "tuned", tuned


def in_two(folder):
    """Codes in one shard, and what lies beside them in the other."""
    whole = folder / "model.safetensors"
    stored = load_file(whole)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    place = {name: names["scale" in name or "shape" in name] for name in stored}
    for file in names:
        save_file({name: value for name, value in stored.items() if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    whole.unlink()


def test_what_was_put_on_it_is_found_with_its_rank_and_verified(pair, tmp_path):
    base, tuned, wanted = pair
    made = extract(base, tuned, "auto", dtype=torch.float32)
    decoded = open_checkpoint(base)
    found = {name: one for name, one in made.layers.items() if "mlp" in name}
    assert len(found) == 6
    for name, layer in found.items():
        assert len(layer.factors.a) == RANK
        delta = wanted[name] - decoded.read(name).float()
        assert torch.allclose(layer.factors.b @ layer.factors.a, delta, atol=1e-5)
    report = verify(made.save(tmp_path / "adapter"), base, tuned)
    assert all(row.delta_cosine > 0.9999 for row in report.rows if "mlp" in row.weight)


def test_what_it_needs_is_what_is_decoded(pair):
    base, tuned, wanted = pair
    found = preflight(base, tuned, 8)
    decoded = open_checkpoint(base)
    assert found.read_bytes == sum(h.bytes for h in decoded.headers.values()) + sum(x.nbytes for x in wanted.values())
    assert inspect(base, tuned).rows.keys() == {name for name in wanted if "mlp" in name}
