"""What goes wrong around the callback is a warning, and never the end of a training run."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading

import peft
import pytest
import torch
import transformers

from hf_callbacks import PosthocLoraCallback, turns
from hf_callbacks.jobs import Jobs
from hf_callbacks.turns import others_wait
from peft_posthoc import PosthocError, extract
from tests.make import models
from tests.make.trainer_runs import STEPS, WEIGHTS, adapters, files, here, same_factors, trainer


def lenient(**options):
    """A callback that works in this process, and warns as a user's does."""
    return PosthocLoraCallback(**{"rank": 4, "background": False, **options})


class At(transformers.TrainerCallback):
    """Does something at an event of a step."""

    def __init__(self, event, work, step=None):
        def act(args, state, control, **kwargs):
            if step is None or state.global_step == step:
                work()

        setattr(self, event, act)


@pytest.mark.parametrize("text", ["", "{", '{"totals": {}, "rows": []}', "[" * 99999])
def test_a_damaged_report_of_an_earlier_step_is_made_again(base, tmp_path, log, text):
    trainer(base, tmp_path, here(), max_steps=4).train()
    (tmp_path / "phlora/step-2/phlora_report.json").write_text(text)
    trainer(base, tmp_path, lenient()).train(resume_from_checkpoint=True)
    assert adapters(tmp_path / "phlora") == ["final", "step-2", "step-4", "step-6"]
    assert json.loads((tmp_path / "phlora/step-2/phlora_report.json").read_text())["totals"]["rank"] == 4


@pytest.mark.parametrize("resumed", [True, False])
@pytest.mark.parametrize("text", ["", '{"source": "/some', "[]", "{}"])
def test_a_damaged_memory_of_the_base_is_told_when_it_is_needed(base, tmp_path, log, text, resumed):
    trainer(base, tmp_path, here(), max_steps=4).train()
    (tmp_path / "_phlora/base.json").write_text(text)
    training = trainer(base, tmp_path, lenient())
    training.train(resume_from_checkpoint=resumed)
    assert training.state.global_step == STEPS
    assert bool(log.of("base.json` is damaged", "Training goes on")) == resumed
    assert ("step-6" in adapters(tmp_path / "phlora")) != resumed


def test_a_base_that_is_the_runs_own_checkpoint_is_not_taken_for_what_it_began_with(base, tmp_path, log):
    trainer(base, tmp_path, max_steps=4).train()
    trainer(tmp_path / "checkpoint-4", tmp_path, lenient()).train(resume_from_checkpoint=True)
    assert log.of("begun without the callback", "give `base=`")
    assert not (tmp_path / "phlora").exists()


@pytest.mark.parametrize("what", ["no interpreter", "no temporary folder"])
def test_a_process_that_cannot_be_started_is_told(base, tmp_path, log, what, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def spoil():
        if what == "no interpreter":
            monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
        else:
            monkeypatch.setattr(tempfile, "tempdir", str(scratch))
            shutil.rmtree(scratch, ignore_errors=True)

    training = trainer(base, tmp_path / "run", PosthocLoraCallback(4), At("on_step_begin", spoil, 1))
    training.train()
    assert training.state.global_step == STEPS
    if what == "no interpreter":
        assert log.of("there is no adapter `step-2`", "could not be started", "gone")
        assert not (tmp_path / "run/phlora").exists()
    else:
        assert adapters(tmp_path / "run/phlora") == ["final", "step-2", "step-4", "step-6"]


def full_from(event, step=None):
    """A disk that is full from an event on: no file can be longer than 1,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    return At(event, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1])), step)


@pytest.fixture
def _room_again():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("_room_again")
def test_a_disk_that_is_full_at_the_end_is_told(base, tmp_path, log):
    training = trainer(base, tmp_path, full_from("on_train_end"), lenient())
    assert training.train().global_step == STEPS
    assert log.of("there is no adapter `final`", "File too large")
    assert adapters(tmp_path / "phlora") == ["step-2", "step-4", "step-6"]
    assert not any((tmp_path / "_phlora/made").iterdir())


@pytest.mark.usefixtures("_room_again")
def test_a_snapshot_that_failed_leaves_nothing(tmp_path, log):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    training = trainer(models.llama(), tmp_path, lenient(), save_strategy="no")  # nameless: its base is a snapshot
    training.train()
    assert training.state.global_step == STEPS
    assert log.of("the base was not found", "snapshot")
    assert files(tmp_path / "_phlora") - {"lock"} == set()


def test_a_page_that_is_the_users_own_stays(base, tmp_path, log):
    out = tmp_path / "adapters"
    out.mkdir()
    (out / "README.md").write_text("mine")
    (out / "step-2").mkdir()
    (out / "step-2/notes.txt").write_text("mine too")
    trainer(base, tmp_path / "run", lenient(out=out)).train()
    assert (out / "README.md").read_text() == "mine"
    assert files(out / "step-2") == {"notes.txt"}
    assert log.of("there is no adapter `step-2`", "something else than an adapter")
    assert log.of("page", "not written by this program")
    assert adapters(out) == ["final", "step-4", "step-6"]


def test_adapters_of_an_earlier_run_are_kept_apart(base, tmp_path, log):
    trainer(base, tmp_path, here()).train()
    before = {name: (tmp_path / "phlora" / name / WEIGHTS).read_bytes() for name in adapters(tmp_path / "phlora")}
    trainer(base, tmp_path, here(rank=4, when=2), learning_rate=1e-2).train()
    assert log.of("adapters of an earlier run", "`final`, `step-2`, `step-4`, `step-6`", "earlier-1")
    assert adapters(tmp_path / "phlora") == ["final", "step-4"]
    assert {name: (tmp_path / "phlora/earlier-1" / name / WEIGHTS).read_bytes() for name in before} == before
    assert "step-2" not in (tmp_path / "phlora/README.md").read_text()
    assert "step-2" in (tmp_path / "phlora/earlier-1/README.md").read_text()


def test_checkpoints_of_an_earlier_run_get_no_adapters_of_this_one(base, tmp_path):
    trainer(base, tmp_path, here(when="end"), max_steps=8).train()
    trainer(base, tmp_path, here(), max_steps=4, learning_rate=1e-2).train()
    assert (tmp_path / "checkpoint-8").exists()
    assert adapters(tmp_path / "phlora") == ["final", "step-2", "step-4"]
    extract(base, tmp_path / "checkpoint-4", 8).save(tmp_path / "by-hand")
    assert same_factors(tmp_path / "phlora/step-4", tmp_path / "by-hand")


def test_a_run_that_goes_on_from_an_earlier_step_keeps_its_newest(base, tmp_path):
    trainer(base, tmp_path, here(keep=2), max_steps=8).train()
    assert adapters(tmp_path / "phlora") == ["final", "step-6", "step-8"]
    trainer(base, tmp_path, here(keep=2), max_steps=6, learning_rate=1e-2).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    assert adapters(tmp_path / "phlora") == ["final", "step-4", "step-6"]
    assert adapters(tmp_path / "phlora/earlier-1") == ["step-6", "step-8"]
    extract(base, tmp_path / "checkpoint-6", 8).save(tmp_path / "by-hand")
    assert same_factors(tmp_path / "phlora/step-6", tmp_path / "by-hand")


def test_a_run_beside_another_one_in_the_same_folder_is_told(base, tmp_path, log):
    hold = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print(flush=True); sys.stdin.read()"
    )
    (tmp_path / "_phlora").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "_phlora/lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        other.stdout.readline()
        trainer(base, tmp_path, lenient()).train()
    assert log.of("another run is at work", "phlora-2")
    assert adapters(tmp_path / "phlora-2") == ["final", "step-2", "step-4", "step-6"]
    assert not (tmp_path / "phlora").exists()
    log.lines.clear()
    trainer(base, tmp_path, lenient()).train()
    assert not log.of("another run is at work")


@pytest.mark.parametrize("background", [True, False])
def test_a_program_that_changes_its_folder_finds_its_adapters_in_the_first_one(
    base, tmp_path, monkeypatch, background, log
):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    shutil.copytree(base, tmp_path / "one/base")
    monkeypatch.chdir(tmp_path / "one")
    callback = PosthocLoraCallback(4, base="base", out="adapters", background=background)
    training = trainer("base", "run", callback, At("on_step_begin", lambda: os.chdir(tmp_path / "two"), 3))
    training.train()
    assert (tmp_path / "two/run/checkpoint-6").exists()
    assert adapters(tmp_path / "one/adapters") == ["final", "step-2", "step-4", "step-6"]
    assert not log.of("no adapter")


class Tracker(transformers.TrainerCallback):
    """Takes rows until the training is over, as trackers do; they stand before other callbacks."""

    def __init__(self):
        self.rows, self.late, self.closed = [], [], False

    def on_log(self, args, state, control, logs=None, **kwargs):
        (self.late if self.closed else self.rows).append(logs)
        if "phlora/energy" in logs:
            control.should_training_stop = True  # which no row of ours may lead to

    def on_train_end(self, args, state, control, **kwargs):
        self.closed = True


@pytest.mark.parametrize("background", [True, False])
def test_trackers_have_the_numbers_before_they_close_and_the_summary_is_the_last_row(base, tmp_path, background):
    tracker = Tracker()
    training = trainer(base, tmp_path, tracker, PosthocLoraCallback(4, background=background))
    training.train()
    assert training.state.global_step == STEPS
    assert [row["phlora/checkpoint_step"] for row in tracker.rows if "phlora/energy" in row] == [2, 4, 6]
    assert tracker.late == []
    assert "train_runtime" in training.state.log_history[-1]
    assert sum("phlora/energy" in row for row in training.state.log_history) == 3


def test_the_summary_that_a_user_logs_again_is_nobodys_turn(base, tmp_path):
    """In one process alone it would be: a turn that the others do not take lets all that follow go wrong."""
    training = trainer(base, tmp_path, lenient())
    training.train()
    before = repr(turns._turns)
    training.log({"train_runtime": 1.0})
    assert repr(turns._turns) == before


def test_a_tracker_that_fails_at_our_numbers_is_told(base, tmp_path, log):
    class Picky(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "train_runtime" not in logs:
                assert logs["loss"] > 0

    training = trainer(base, tmp_path, Picky(), lenient())
    training.train()
    assert training.state.global_step == STEPS
    assert log.of("`Picky` did not take the numbers")
    assert adapters(tmp_path / "phlora") == ["final", "step-2", "step-4", "step-6"]


@pytest.mark.parametrize("when", ["save", "end"])
def test_a_run_that_trains_an_adapter_of_its_own_is_told_once(base, tmp_path, log, when):
    model = peft.get_peft_model(models.load(base), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    training = trainer(model, tmp_path, lenient(when=when))
    training.train()
    assert len(log.lines) == 1
    assert log.of("trains a PEFT adapter of its own")
    assert not (tmp_path / "phlora").exists()
    assert not (tmp_path / "_phlora/base").exists()


@pytest.mark.parametrize("event", ["on_init_end", "on_train_begin", "on_save", "on_step_end", "on_log", "on_train_end"])
def test_whatever_fails_in_an_event_is_told_and_raised_by_strict(base, tmp_path, log, event, monkeypatch):
    """A folder that cannot be listed, a report that cannot be read, ...: any read of ours may fail."""

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied", "somewhere")

    first = {
        "on_init_end": "hf_callbacks.callback.Run",
        "on_train_begin": "hf_callbacks.callback.remember",
        "on_save": "hf_callbacks.run.pin",
        "on_step_end": "hf_callbacks.run.Run.__len__",
        "on_log": "hf_callbacks.run.Run.missing",
        "on_train_end": "hf_callbacks.run.Run.copy",
    }[event]
    training = trainer(base, tmp_path / "lenient") if event != "on_init_end" else None
    monkeypatch.setattr(first, fail)
    training = training or trainer(base, tmp_path / "lenient", lenient())
    if event != "on_init_end":
        training.add_callback(lenient())
    training.train()
    assert training.state.global_step == STEPS
    assert log.of("Permission denied", "Training goes on")
    with pytest.raises(PosthocError, match="Permission denied"):
        trainer(base, tmp_path / "strict", here()).train()


def test_a_job_that_cannot_be_started_does_not_hold_up_the_next(tmp_path, monkeypatch):
    from hf_callbacks.jobs import Job

    jobs = Jobs(tmp_path / "not there")
    for step in (1, 2):
        jobs.add(Job(f"step-{step}", step, None, tmp_path / "made", None))
    assert [(done.job.step, "could not be started" in done.failure) for done in jobs.poll()] == [(1, True), (2, True)]
    assert len(jobs) == 0


def test_waiting_for_the_first_process_takes_nothing_where_there_is_one():
    with others_wait(first=False):
        pass


def test_the_others_wait_as_long_as_the_first_works(tmp_path):
    """Two of a store's clients, in two threads: the second's waits are too short, and it waits again."""
    from datetime import timedelta

    from hf_callbacks import turns

    store, order = torch.distributed.FileStore(str(tmp_path / "store"), 2), []

    def second():
        turns.wait(store, "key", patience=timedelta(milliseconds=50))
        order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    order.append("first")
    turns.signal(store, "key")
    thread.join(20)
    assert order == ["first", "second"]
