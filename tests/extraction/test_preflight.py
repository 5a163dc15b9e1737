import json
import os

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from peft_posthoc import AdapterError, CheckpointError, MismatchError, extract, open_checkpoint, preflight
from peft_posthoc.cli.main import main
from tests.make import architectures


class NeverRead:
    """A checkpoint whose tensors are not to be read."""

    def __init__(self, source):
        self._checkpoint = open_checkpoint(source)

    def __getattr__(self, name):
        return getattr(self._checkpoint, name)

    def read(self, name):
        raise AssertionError(f"`{name}` was read.")


@pytest.mark.parametrize("form", ["portable", "peft"])
@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gpt2", "mixtral", "gpt_oss", "vit", "t5"])
def test_it_says_without_reading_a_tensor_what_the_extraction_then_does(name, form, tmp_path):
    base, tuned = architectures.pair_of(name, tmp_path)
    found = preflight(NeverRead(base), NeverRead(tuned), 4, form=form)
    report = extract(base, tuned, 4, form=form).report
    said = {"extracted": "carried", "whole": "whole", "left out": "left out", "unchanged": None}
    wanted = {row.weight: (said[row.status], row.reason, row.rank, row.bytes) for row in report.rows}
    assert {row.weight: (row.status, row.reason, row.rank, row.bytes) for row in found.rows} == wanted
    assert found.adapter_bytes == report.totals.bytes
    assert found.rank_is_known


def test_what_is_needed_is_counted(llama_pair, tmp_path):
    found = preflight(*llama_pair, 4, out=tmp_path / "new" / "out")
    sizes = [os.path.getsize(f"{folder}/model.safetensors") for folder in llama_pair]
    assert 0.9 * sum(sizes) < found.read_bytes < sum(sizes)
    # Padded to rank 8 in the file, rank 4 in float32 until it is written.
    assert found.disk_bytes == 1.5 * found.adapter_bytes
    assert found.disk_free > 0
    values = sum(row.bytes for row in found.rows)
    assert values == found.adapter_bytes
    assert 0.3 < found.values < 1


def test_memory_grows_with_the_largest_weight_and_the_rank():
    def needed(rows, rank):
        pair = [{"a.weight": torch.zeros(1).expand(rows, 4096)} for _ in range(2)]
        return preflight(*pair, rank).memory_bytes

    assert needed(8192, 8) - needed(4096, 8) >= 2 * 4 * 4096 * 4096
    assert needed(4096, 256) - needed(4096, 8) >= 4 * 248 * (4096 + 4096)


def test_where_the_rule_looks_at_the_spectrum_it_says_that_the_size_is_a_guess(llama_pair):
    found = preflight(*llama_pair, 0.9)
    assert not found.rank_is_known
    assert "at rank 32 (the rule decides)" in found.table()


def test_the_command_writes_nothing(llama_pair, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["extract", *llama_pair, str(out), "--rank", "4", "--dry-run"])
    assert result.exit_code == 0, result.stderr
    assert "model.layers.0.self_attn.q_proj.weight" in result.stdout
    assert "embedding (carried with --embeddings)" in result.stdout
    assert "Disk needed:" in result.stdout
    assert list(tmp_path.iterdir()) == []
    read = CliRunner().invoke(main, ["extract", *llama_pair, str(out), "--rank", "4", "--dry-run", "--json"])
    assert json.loads(read.stdout)["adapter_bytes"] == preflight(*llama_pair, 4).adapter_bytes


def test_a_checkpoint_that_cannot_be_is_told_as_the_extraction_tells_it(llama_pair, tmp_path):
    for sides, error in (
        (("no-such-folder", llama_pair[1]), CheckpointError),
        (({"a": torch.ones(2, 2)}, llama_pair[1]), MismatchError),
    ):
        with pytest.raises(error) as told:
            preflight(*sides)
        with pytest.raises(error) as later:
            extract(*sides)
        assert str(told.value) == str(later.value)


def test_without_room_nothing_is_read(llama_pair, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(AdapterError, match=r"needs .* and 1.0 kB are free there"):
        extract(NeverRead(llama_pair[0]), NeverRead(llama_pair[1]), 4, out=tmp_path / "out")


def test_a_weight_that_peft_would_misread_is_left_out_before_a_tensor_is_read(tmp_path):
    """A layer whose name means one that has no LoRA form."""
    weights = {"q.weight": torch.ones(4, 4), "b.q.weight": torch.ones(4, 4, 4), "b.k.weight": torch.ones(4, 4)}
    pair = []
    for side in ("base", "tuned"):
        save_file(weights, tmp_path / f"{side}.safetensors")
        pair.append(NeverRead(tmp_path / f"{side}.safetensors"))
    left = {row.weight: row.reason for row in preflight(*pair, 2).rows if row.status == "left out"}
    assert left["q.weight"] == "PEFT would take the name of its module, `q`, to mean `b.q` too"
    assert left.keys() == {"q.weight", "b.q.weight"}


def test_a_large_model_s_takes_no_longer_than_its_headers(tmp_path):
    """A 70B Llama's names and shapes in tensors that take no memory: 140 GB are told and none is touched."""
    hidden, between, layers = 8192, 28672, 80
    shapes = {"model.embed_tokens.weight": (128256, hidden), "lm_head.weight": (128256, hidden)}
    for layer in range(layers):
        for name, shape in {
            **{"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (1024, hidden)},
            **{"self_attn.v_proj": (1024, hidden), "self_attn.o_proj": (hidden, hidden)},
            **{
                "mlp.gate_proj": (between, hidden),
                "mlp.up_proj": (between, hidden),
                "mlp.down_proj": (hidden, between),
            },
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    pair = [{n: torch.zeros((), dtype=torch.bfloat16).expand(s) for n, s in shapes.items()} for _ in range(2)]
    found = preflight(*pair, 64)
    assert found.read_bytes == 2 * 2 * sum(rows * columns for rows, columns in shapes.values()) > 270e9
    per_layer = 2 * (hidden + hidden) + 2 * (1024 + hidden) + 3 * (hidden + between)
    assert found.adapter_bytes == 2 * 64 * layers * per_layer
    assert found.memory_bytes < 20e9
