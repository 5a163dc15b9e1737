"""What the callback shows: numbers in the Trainer's log, a card for each adapter, a page for a run."""

import json
import sys

import matplotlib.image
import pytest
import transformers

from hf_callbacks.metrics import eval_losses
from hf_callbacks.plot import plot
from peft_posthoc import extract
from peft_posthoc.ranks.rules import keep_energy
from tests.make.trainer_runs import files, here, trainer


def test_energies_reach_the_log_at_the_step_they_belong_to(base, tmp_path):
    training = trainer(base, tmp_path, here())
    training.train()
    logged = [entry for entry in training.state.log_history if "phlora/energy" in entry]
    assert [entry["phlora/checkpoint_step"] for entry in logged] == [2, 4, 6]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    for entry in logged:
        adapter = extract(base, tmp_path / f"checkpoint-{entry['step']}", 8)
        assert entry["phlora/energy"] == pytest.approx(adapter.report.totals.energy)
        kept = sum(layer.factors.s.square().sum() for name, layer in adapter.layers.items() if "q_proj" in name)
        whole = sum(layer.factors.norm**2 for name, layer in adapter.layers.items() if "q_proj" in name)
        assert entry["phlora/energy/q_proj"] == pytest.approx(float(kept / whole))
        norms = [layer.factors.norm**2 for layer in adapter.layers.values()]
        norms += [skipped.delta_norm**2 for skipped in adapter.skipped.values()]
        assert entry["phlora/delta_norm"] == pytest.approx(sum(norms) ** 0.5)
        assert [name for name in entry if "_at_" in name] == [f"phlora/energy_at_{rank}" for rank in (1, 2, 4)]
        for rank in (1, 2, 4):
            cut = extract(base, tmp_path / f"checkpoint-{entry['step']}", rank, exact=True).report.totals.energy
            assert entry[f"phlora/energy_at_{rank}"] == pytest.approx(cut, rel=1e-4)
    saved = json.loads((tmp_path / "checkpoint-6/trainer_state.json").read_text())["log_history"]
    assert [entry["phlora/checkpoint_step"] for entry in saved if "phlora/energy" in entry] == [2, 4]


def test_a_run_has_a_page_and_every_adapter_a_card(base, tmp_path):
    trainer(base, tmp_path, here()).train()
    page = (tmp_path / "phlora/README.md").read_text()
    assert [line.split("|")[1].strip() for line in page.splitlines() if "`step-" in line] == ["2", "4", "6"]
    card = (tmp_path / "phlora/step-4/README.md").read_text()
    totals = json.loads((tmp_path / "phlora/step-4/phlora_report.json").read_text())["totals"]
    for words in ("library_name: peft", "at step 4", f"`{base}`", f"{totals['energy']:.1%}", "PeftModel", "vllm serve"):
        assert words in card


def rows(page):
    """The cells of the table of a run's page, by folder."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {cells[-1].strip("`"): dict(zip(lines[0], cells, strict=True)) for cells in lines}


def test_the_page_has_a_row_for_final_the_losses_of_evaluations_warnings_and_how_to_load_it(base, tmp_path):
    losses = {2: 3.25, 4: 1.5, 6: 2.125}

    class Judge(transformers.TrainerCallback):
        """Says what an evaluation found."""

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            state.log_history[-1]["eval_loss"] = metrics["eval_loss"] = losses[state.global_step]

    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer(base, tmp_path, Judge(), here(), **best).train()
    page = (tmp_path / "phlora/README.md").read_text()
    told = rows(page)
    assert [told[f"step-{step}"]["eval_loss"] for step in losses] == ["3.25", "1.5", "2.125"]
    assert told["final"] == {**told["step-4"], "folder": "`final`"}
    report = json.loads((tmp_path / "phlora/final/phlora_report.json").read_text())
    assert report["warnings"]
    for words in (*report["warnings"], f"The base is `{base}`.", f'from_pretrained("{base}")', "this/folder/final"):
        assert words in page
    figure = plot({step: tmp_path / f"phlora/step-{step}" for step in losses}, {2: {"eval_loss": 3.25}})
    assert [list(line.get_ydata()) for line in figure.axes[1].lines] == [[3.25]]


def test_the_losses_of_every_data_set_are_on_the_page_and_what_is_damaged_is_passed_over():
    rows = [
        {"eval_en_loss": 2.0, "eval_runtime": 1.0, "step": 3},
        {"eval_de_loss": 1, "step": 3},
        {"loss": 1, "step": 4},
    ]
    assert eval_losses(rows) == {3: {"eval_en_loss": 2.0, "eval_de_loss": 1.0}}
    assert eval_losses([1, {"eval_loss": "x", "step": 1}, {"eval_loss": 1.0}]) == eval_losses(5) == {}


def test_the_page_shows_energy_and_rank_over_steps(base, tmp_path):
    trainer(base, tmp_path, here(rank=keep_energy(0.7))).train()
    assert "](energy.png)" in (tmp_path / "phlora/README.md").read_text()
    pixels = matplotlib.image.imread(tmp_path / "phlora/energy.png")
    assert pixels.shape[:2] == (900, 1200)
    folders = {step: tmp_path / f"phlora/step-{step}" for step in (6, 2, 4)}
    totals = [json.loads((folders[step] / "phlora_report.json").read_text())["totals"] for step in (2, 4, 6)]
    above, below = plot(folders).axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in above.lines}
    assert drawn["kept"] == ([2, 4, 6], [each["energy"] for each in totals])
    assert drawn["kept, of the whole fine-tune"] == ([2, 4, 6], [each["energy_of_all"] for each in totals])
    assert drawn["at rank 4"] == ([2, 4, 6], [each["energy_at"]["4"] for each in totals])
    assert list(below.lines[0].get_ydata()) == [each["rank"] for each in totals]


def test_without_matplotlib_the_page_is_only_a_table(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer(base, tmp_path, here()).train()
    assert "energy.png" not in (tmp_path / "phlora/README.md").read_text()
    assert files(tmp_path / "phlora") >= {"README.md", "step-6", "final"}
    assert not (tmp_path / "phlora/energy.png").exists()
