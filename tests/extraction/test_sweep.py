"""The sweep over every class (`make sweep`), on a few: what it says right of is right, and what is wrong it finds."""

import copy
import json
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from peft_posthoc import extract
from tests import sweep
from tests.make import small, sweep_page


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """The folders of a pair with tied embeddings, the adapter of it, and what the sweep says of it."""
    folder = tmp_path_factory.mktemp("tied")
    base, tuned = sweep.pair("T5ForConditionalGeneration", folder)
    told = extract(base, tuned, sweep.RANK, form="peft", out=folder / "out")
    told.save(folder / "out")
    before, after = (sweep.load("T5ForConditionalGeneration", one)[0] for one in (base, tuned))
    return base, folder / "out", before, after, told.report.totals.energy_of_all


def test_a_sweep_goes_over_classes_of_both_libraries_each_in_a_process_and_keeps_their_rows(
    tmp_path, monkeypatch, capsys
):
    names = ["T5ForConditionalGeneration", "FluxTransformer2DModel", "NoSuchClass"]
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "tests.sweep", *names, "--rows", rows]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = sweep.read(rows)
    assert set(found) == set(names)
    assert "NoSuchClass" in found["NoSuchClass"]["not_built"]
    for name in names[:2]:
        assert f"{name} right" in done.stdout
        assert found[name]["forms"].keys() == sweep.FORMS.keys()
        assert found[name]["forms"]["peft"]["true"] > 0.97
    # What is done stays done.
    monkeypatch.setattr("sys.argv", [str(one) for one in command[2:]])
    with pytest.raises(SystemExit, match="0"):
        sweep.main()
    assert not capsys.readouterr().out
    section = sweep_page.section(found.values(), sweep.RANK)
    assert "2 of the 3 build" in section
    assert "| T5ForConditionalGeneration |" in section


def test_a_factor_of_zeros_is_a_failure(tied, tmp_path):
    base, adapter, before, after, told = tied
    good = sweep.arrived("T5ForConditionalGeneration", base, adapter, before, after)
    assert not sweep.failure(_row(told, good))
    tensors = load_file(adapter / "adapter_model.safetensors")
    spoiled = next(name for name in tensors if "wi.lora_B" in name)
    save_file({**tensors, spoiled: 0 * tensors[spoiled]}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    bad = sweep.arrived("T5ForConditionalGeneration", base, tmp_path, before, after)
    assert "told" in sweep.failure(_row(told, bad))


def test_a_factor_that_is_not_there_is_a_failure(tied, tmp_path):
    base, adapter, before, after, _ = tied
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: one for name, one in tensors.items() if "wi.lora_" not in name}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    bad = sweep.arrived("T5ForConditionalGeneration", base, tmp_path, before, after)
    assert "missing adapter keys" in sweep.failure(_row(bad["true"], bad))


@pytest.mark.parametrize("told", [0.5, 1.2, float("nan")])
def test_a_share_that_is_told_wrong_is_a_failure(told):
    assert sweep.failure(_row(told, {"true": 0.9}))


def test_a_weight_of_two_places_counts_by_the_one_where_less_of_it_arrived(tied):
    _, _, before, after, _ = tied
    sweep.untie(half := copy.deepcopy(after))
    assert sweep.share(before, after, half)[0] == 1
    half.encoder.embed_tokens.weight.data.copy_(before.shared.weight)
    sweep.untie(none := copy.deepcopy(half))
    for place in (none.shared, none.decoder.embed_tokens, none.lm_head):
        place.weight.data.copy_(before.shared.weight)
    assert sweep.share(before, after, half)[0] == sweep.share(before, after, none)[0]
    assert sweep.share(before, after, half)[0] < 0.95


def test_every_size_of_a_configuration_shrinks_and_never_grows():
    assert small.shrunk("hidden_size", 4096) == 32
    assert small.shrunk("vocab_size", 50) == 50
    assert small.shrunk("image_token_id", 151655) < 96


def test_what_the_page_tells_of_every_class_is_true_within_a_per_cent():
    rows = re.findall(r"^\| \w+ \| [\d,]+ \| (.*) \|$", sweep_page.kept(), re.MULTILINE)
    assert len(rows) > 400
    for row in rows:
        for told, true in (cell.split() for cell in row.split(" | ") if "." in cell):
            assert true == "†" or abs(float(told) - float(true)) <= 1.1, row


def _row(told, found):
    return json.loads(json.dumps({"class": "T5", "forms": {"peft": {"told": told, **found}}}))
