"""The demo runs from end to end, with models so small that only the scores mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.make.limits import HANG

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def run_demo(work: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(DEMO), "--quick", "--work", str(work)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "work"
    run_demo(folder)
    return folder


@pytest.fixture(scope="module")
def rows(work):
    return {row["folder"]: row for row in json.loads((work / "table.json").read_text())}


def test_table_has_both_models_and_every_adapter(work, rows):
    assert list(rows) == [
        *("base", "tuned"),
        *(f"adapter-{kind}-r{rank}" for kind in ("linear", "whole") for rank in (8, 16)),
    ]
    lines = (work / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1


def test_plot_is_a_png_with_something_in_it(work):
    png = (work / "energy.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(png) > 5_000


def test_numbers_in_the_table_are_those_of_the_files(work, rows):
    for folder, row in rows.items():
        tensors = [load_file(file) for file in (work / folder).glob("*.safetensors")]
        weights = sum(tensor.nbytes for file in tensors for tensor in file.values())
        assert weights <= row["bytes"] <= weights + 50_000  # and the header
        assert row["load"] > 0
        assert 0 <= row["score"]["values"] <= row["score"]["keys"] <= 1
        if row["rank"] is not None:
            report = json.loads((work / folder / "phlora_report.json").read_text())
            assert row["energy"] == report["totals"]["energy"]


def test_energy_grows_with_rank_and_with_what_is_carried(rows):
    for kind in ("linear", "whole"):
        small, large = rows[f"adapter-{kind}-r8"], rows[f"adapter-{kind}-r16"]
        assert 0 < small["energy"] < large["energy"] < 1
        assert small["bytes"] < large["bytes"] < rows["tuned"]["bytes"]
    for rank in (8, 16):
        linear, whole = rows[f"adapter-linear-r{rank}"], rows[f"adapter-whole-r{rank}"]
        assert linear["energy_of_all"] < linear["energy"]
        assert linear["energy_of_all"] < whole["energy_of_all"]


def test_fine_tune_moved_every_weight_of_the_base(work):
    base, tuned = (load_file(work / name / "model.safetensors") for name in ("base", "tuned"))
    assert base.keys() == tuned.keys()
    assert all((base[name] != tuned[name]).any() for name in base)


def test_second_run_keeps_the_models_and_says_the_same(work, rows):
    before = (work / "tuned" / "model.safetensors").stat().st_mtime_ns
    assert "kept from an earlier run" in run_demo(work)
    assert (work / "tuned" / "model.safetensors").stat().st_mtime_ns == before
    again = {row["folder"]: row for row in json.loads((work / "table.json").read_text())}
    assert {k: (r["score"], r["energy"]) for k, r in again.items()} == {
        k: (r["score"], r["energy"]) for k, r in rows.items()
    }


def test_no_pair_of_a_test_report_is_in_a_training_report(monkeypatch):
    monkeypatch.syspath_prepend(DEMO.parent)
    from demo_task import train_and_test

    training, test = train_and_test(6400, 150)
    for keys in (("module", "error"), ("input",)):
        seen = {tuple(report.facts.get(key) for key in keys) for report in training} - {(None,)}
        assert seen.isdisjoint({tuple(report.facts.get(key) for key in keys) for report in test} - {(None,)})


def test_score_counts_keys_and_exact_values(monkeypatch):
    monkeypatch.syspath_prepend(DEMO.parent)
    from demo_task import Report, Score, score

    truth = [Report("", {"module": "json", "error": "KeyError"})] * 2
    assert score([report.answer for report in truth], truth) == Score(1.0, 1.0)
    assert score(['{"module": "json", "error": "OSError"}', "not JSON"], truth) == Score(0.5, 0.25)
    assert score(["[1]", '{"error": "KeyError"}'], truth) == Score(0.25, 0.25)


def test_the_real_base_learns_from_a_step_of_reports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DEMO.parent)
    from demo import real_base
    from demo_model import SMOLLM2, collate, train
    from demo_task import train_and_test
    from transformers import AutoModelForCausalLM, AutoTokenizer

    real_base(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert tokenizer.pad_token_id is not None
    # Padding is on the left: the last token of every row is the end of its answer.
    batch = collate(train_and_test(8, 1)[0][:2], tokenizer)
    assert (batch.input_ids[:, -1] == tokenizer.eos_token_id).all()
    before = model(**batch._asdict()).loss.item()
    train(model, [batch] * 2, steps=2, lr=SMOLLM2.tune_lr, title="")
    assert model(**batch._asdict()).loss.item() < before
