"""What goes wrong in the callback: told, while training goes on."""

import errno
import json
import os
import signal
import time

import pytest
import transformers

from hf_callbacks import PosthocLoraCallback
from peft_posthoc import PosthocError
from peft_posthoc.adapters import writer
from tests.make import models
from tests.make.trainer_runs import STEPS, adapters, alive, extractions, files, here, trainer


def test_a_base_of_another_shape_is_told_and_training_goes_on(tmp_path, log, base):
    models.llama(hidden_size=64).save_pretrained(tmp_path / "other")
    training = trainer(base, tmp_path / "run", PosthocLoraCallback(8, base=tmp_path / "other", background=False))
    training.train()
    assert training.state.global_step == STEPS
    assert len(log.of("there is no adapter `step-2`", "shape")) >= 1
    assert not (tmp_path / "run/phlora").exists()


def test_a_base_that_is_not_there_is_told_before_the_first_step(base, tmp_path, log):
    with pytest.raises(PosthocError, match="does not exist"):
        trainer(base, tmp_path / "a", here(base=tmp_path / "nowhere")).train()
    trainer(base, tmp_path / "b", PosthocLoraCallback(8, base=tmp_path / "nowhere", background=False)).train()
    assert log.of("does not exist", "Training goes on")


def test_a_full_disk_leaves_no_half_adapter(base, tmp_path, log, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "save_file", full)
    training = trainer(base, tmp_path, PosthocLoraCallback(8, background=False))
    training.train()
    assert training.state.global_step == STEPS
    assert log.of("there is no adapter `step-4`", "No space left on device")
    assert files(tmp_path / "phlora") <= set()
    assert not any((tmp_path / "_phlora/pinned").iterdir())


def test_a_folder_that_cannot_be_written_to_is_told(base, tmp_path, log):
    (tmp_path / "file").write_text("mine")
    training = trainer(base, tmp_path / "run", PosthocLoraCallback(8, out=tmp_path / "file", background=False))
    training.train()
    assert training.state.global_step == STEPS
    assert log.of("there is no adapter `step-2`", "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_where_there_are_no_links_files_are_copied(base, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    trainer(base, tmp_path, here()).train()
    assert adapters(tmp_path / "phlora") == ["final", "step-2", "step-4", "step-6"]


def test_strict_raises(base, tmp_path):
    with pytest.raises(PosthocError, match="There is no adapter `step-2`"):
        trainer(base, tmp_path, here(include="no such weight")).train()


def test_a_killed_process_is_told_and_its_adapter_made_at_the_end(base, tmp_path, log):
    class Killer(transformers.TrainerCallback):
        done = False

        def on_step_end(self, args, state, control, **kwargs):
            for child in () if self.done else extractions():
                self.done = True
                os.kill(child, signal.SIGKILL)
                while alive(child):
                    time.sleep(0.01)

    training = trainer(base, tmp_path, PosthocLoraCallback(8), Killer(), save_total_limit=1)
    training.train()
    assert log.of("there is no adapter `step-2`", "killed by signal 9")
    assert adapters(tmp_path / "phlora") == ["final", "step-2", "step-4", "step-6"]
    assert not any((tmp_path / "_phlora/pinned").iterdir())


def test_a_rule_that_is_a_function_works_in_this_process_only(base, tmp_path):
    with pytest.raises(ValueError, match="background=False"):
        PosthocLoraCallback(lambda spectrum: 3)
    trainer(base, tmp_path, here(rank=lambda spectrum: 3, when="end")).train()
    assert json.loads((tmp_path / "phlora/final/phlora_report.json").read_text())["totals"]["rank"] == 3


@pytest.mark.parametrize(
    "options", [{"when": 0}, {"when": "never"}, {"when": True}, {"keep": 0}, {"rank": 0}, {"form": "no"}]
)
def test_arguments_without_sense_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}"):
        PosthocLoraCallback(**options)
