"""`phlora catch-up`: adapters for the checkpoints of a run that is over."""

import json
import shutil
from collections import Counter

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file

from hf_callbacks import PosthocLoraCallback
from peft_posthoc import extract
from peft_posthoc.checkpoints.folder import Folder
from peft_posthoc.cli.main import main
from tests.make.trainer_runs import WEIGHTS, adapters, here, same_factors, trainer


def run_catch_up(*arguments):
    return CliRunner().invoke(main, ["catch-up", *map(str, arguments)])


def test_a_run_that_is_over_is_caught_up_with(base, tmp_path):
    training = trainer(base, tmp_path / "run", eval_strategy="steps", eval_steps=2)
    training.train()
    result = run_catch_up(tmp_path / "run", "--base", base, "--rank", "8")
    assert result.exit_code == 0, result.output
    assert adapters(tmp_path / "run/phlora") == ["final", "step-2", "step-4", "step-6"]
    extract(base, tmp_path / "run/checkpoint-4", 8).save(tmp_path / "by-hand")
    assert same_factors(tmp_path / "run/phlora/step-4", tmp_path / "by-hand")
    assert "](energy.png)" in (tmp_path / "run/phlora/README.md").read_text()
    losses = [f"{row['eval_loss']:.4g}" for row in training.state.log_history if "eval_loss" in row]
    rows = [line for line in (tmp_path / "run/phlora/README.md").read_text().splitlines() if "`step-" in line]
    assert [row.split(" | ")[3] for row in rows] == losses
    assert (tmp_path / "run/phlora/energy.png").is_file()
    assert result.stdout == f"4 adapters are in {tmp_path / 'run/phlora'}\n"
    kept = (tmp_path / "run/phlora/step-4" / WEIGHTS).stat().st_mtime_ns
    told = json.loads(run_catch_up(tmp_path / "run", "--base", base, "--json").stdout)
    assert (told["adapters"], told["failures"]) == (["step-2", "step-4", "step-6", "final"], [])
    assert (tmp_path / "run/phlora/step-4" / WEIGHTS).stat().st_mtime_ns == kept


def test_the_base_is_read_once_for_all_checkpoints(base, tmp_path, monkeypatch):
    trainer(base, tmp_path / "run").train()
    read, real = Counter(), Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, name: (read.update([(self.label, name)]), real(self, name))[1])
    assert run_catch_up(tmp_path / "run", "--base", base, "--rank", "8").exit_code == 0
    monkeypatch.undo()
    assert {label for label, _ in read} == {str(base), *(f"run/checkpoint-{step}" for step in (2, 4, 6))}
    assert set(read.values()) == {1}
    assert adapters(tmp_path / "run/phlora") == ["final", "step-2", "step-4", "step-6"]
    assert report(tmp_path / "run/phlora/step-4")["provenance"]["tuned"] == "run/checkpoint-4"
    assert not list((tmp_path / "run/_phlora").glob("made/*"))


def test_what_cannot_be_made_with_the_others_is_made_by_itself(base, tmp_path, monkeypatch):
    trainer(base, tmp_path / "run").train()
    save_file({"stranger.weight": torch.ones(2, 2)}, tmp_path / "run/checkpoint-4/model.safetensors")
    result = run_catch_up(tmp_path / "run", "--base", base, "--rank", "8")
    assert result.exit_code == 1
    assert "There is no adapter `step-4`" in result.output
    assert adapters(tmp_path / "run/phlora") == ["final", "step-2", "step-6"]


def test_a_run_is_caught_up_with_in_either_form(base, tmp_path):
    trainer(base, tmp_path / "run").train()
    assert run_catch_up(tmp_path / "run", "--base", base, "--rank", "8", "--form", "peft").exit_code == 0
    extract(base, tmp_path / "run/checkpoint-4", 8, form="peft").save(tmp_path / "by-hand")
    assert same_factors(tmp_path / "run/phlora/step-4", tmp_path / "by-hand")


def test_catching_up_says_what_it_needs(base, tmp_path):
    assert "Give --base" in run_catch_up(tmp_path).output
    assert "no checkpoints" in run_catch_up(tmp_path, "--base", base).output
    (tmp_path / "checkpoint-3").mkdir()
    result = run_catch_up(tmp_path, "--base", base)
    assert result.exit_code == 1
    assert "no adapter `step-3`" in result.output


def report(adapter):
    return json.loads((adapter / "phlora_report.json").read_text())


def test_the_runs_own_options_are_taken(base, tmp_path):
    trainer(base, tmp_path / "run", here(rank=5, when="end", head=True, exclude="q_proj", dtype=None)).train()
    result = run_catch_up(tmp_path / "run")
    assert result.exit_code == 0, result.output
    options = {"head": True, "exclude": "q_proj"}
    extract(base, tmp_path / "run/checkpoint-4", 5, **options).save(tmp_path / "by-hand")
    assert same_factors(tmp_path / "run/phlora/step-4", tmp_path / "by-hand")
    # What is given takes the place of the run's, and nothing else of it.
    shutil.rmtree(tmp_path / "run/phlora")
    assert run_catch_up(tmp_path / "run", "--energy", "0.5").exit_code == 0
    rows = report(tmp_path / "run/phlora/step-4")["rows"]
    assert all(row["energy"] >= 0.5 for row in rows if row["status"] == "extracted")
    assert {row["weight"] for row in rows if row["status"] == "extracted"} >= {"lm_head.weight"}


class Judge(transformers.TrainerCallback):
    """Finds the model of step 4 the best."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = abs(state.global_step - 4.0)


@pytest.mark.parametrize("callback", [True, False])
@pytest.mark.parametrize("best", [True, False])
def test_final_is_the_best_where_the_run_says_so(base, tmp_path, best, callback):
    options = {"load_best_model_at_end": True} if best else {}
    ours = [PosthocLoraCallback(8, background=False, when=1)] if callback else []
    training = trainer(base, tmp_path, *ours, eval_strategy="steps", eval_steps=2, **options)
    training.callback_handler.callbacks.insert(0, Judge())
    training.train()
    shutil.rmtree(tmp_path / "phlora", ignore_errors=True)
    assert run_catch_up(tmp_path, "--base", base, "--rank", "8").exit_code == 0
    assert same_factors(tmp_path / "phlora/final", tmp_path / f"phlora/step-{4 if best else 6}")


def test_weights_that_are_links_are_read(base, tmp_path):
    trainer(base, tmp_path / "run", max_steps=2).train()
    weights = tmp_path / "run/checkpoint-2/model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to("../../blob")
    result = run_catch_up(tmp_path / "run", "--base", base, "--rank", "8")
    assert result.exit_code == 0, result.output
    assert adapters(tmp_path / "run/phlora") == ["final", "step-2"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"source": 3, "revision": null, "how": ""}', "[" * 99999])
def test_a_damaged_memory_is_told_and_can_be_done_without(base, tmp_path, text):
    trainer(base, tmp_path, max_steps=2).train()
    (tmp_path / "_phlora").mkdir()
    (tmp_path / "_phlora/base.json").write_text(text)
    result = run_catch_up(tmp_path)
    assert result.exit_code == 1
    assert "base.json` is damaged" in result.output
    assert "Give --base" in result.output
    assert run_catch_up(tmp_path, "--base", base).exit_code == 0


def test_a_damaged_adapter_is_made_again(base, tmp_path):
    trainer(base, tmp_path, here(), max_steps=4).train()
    (tmp_path / "phlora/step-2/phlora_report.json").write_text("{")
    assert run_catch_up(tmp_path).exit_code == 0
    assert report(tmp_path / "phlora/step-2")["totals"]["rank"] == 8


@pytest.mark.parametrize("options", [["--vocab", "extend"], ["--form", "peft", "--experts", "per-expert"]])
def test_options_without_sense_are_told_in_one_line(base, tmp_path, options):
    result = run_catch_up(tmp_path, "--base", base, *options)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.output.splitlines()[-1].startswith("Error: ")
