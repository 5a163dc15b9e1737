"""The Trainer's callback, in real runs of the real Trainer."""

import errno
import json
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import matplotlib.image
import pytest
import torch
import transformers

from hf_callbacks import PosthocLoraCallback
from hf_callbacks import run as run_module
from hf_callbacks.plot import plot
from hf_callbacks.run import Run
from peft_posthoc import PosthocError, extract
from peft_posthoc.adapters import writer
from peft_posthoc.ranks.rules import keep_energy
from tests.make import models
from tests.make.trainer_runs import STEPS, adapters, examples, files, here, same_factors, trainer


@pytest.fixture
def base(llama_pair):
    return llama_pair[0]


@pytest.fixture(autouse=True)
def _no_wish_for_an_older_optimizer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        yield


@pytest.mark.parametrize("background", [True, False])
def test_every_checkpoint_gets_the_adapter_that_is_extracted_from_it_by_hand(base, tmp_path, background, monkeypatch):
    # A launcher's variables, with which an extraction would take itself for one of several.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    callback = here(background=background)
    training = trainer(base, tmp_path / "run", callback)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    training.train()
    assert adapters(tmp_path / "run/phlora") == ["final", "step-2", "step-4", "step-6"]
    for step in (2, 4, 6):
        checkpoint = tmp_path / f"run/checkpoint-{step}"
        extract(base, checkpoint, 8).save(tmp_path / f"by-hand-{step}")
        assert same_factors(tmp_path / f"run/phlora/step-{step}", tmp_path / f"by-hand-{step}")
        report = json.loads((tmp_path / f"run/phlora/step-{step}/phlora_report.json").read_text())
        assert report["provenance"]["tuned"] == f"run/checkpoint-{step}"
        assert report["provenance"]["base"] == str(base)
    assert same_factors(tmp_path / "run/phlora/final", tmp_path / "run/phlora/step-6")
    assert files(tmp_path / "run/_phlora") - {"lock"} == {"base.json", "made", "pinned"}


def test_the_adapter_computes_what_the_checkpoint_does_in_stock_peft(base, tmp_path):
    trainer(base, tmp_path, here(rank=48, embeddings=True, head=True)).train()
    ids = torch.arange(40)[None]
    tuned = models.load(tmp_path / f"checkpoint-{STEPS}")
    for name, parameter in models.load(base).named_parameters():
        if "norm" in name:  # the only weights that are not carried
            tuned.get_parameter(name).data = parameter.data
    wanted, alone = tuned(ids).logits, models.load(base)(ids).logits
    got = models.load_adapter(base, tmp_path / "phlora/final")(ids).logits
    assert (got - wanted).norm() <= 1e-4 * (alone - wanted).norm()


def test_a_sequence_to_sequence_model_gets_its_adapters_too(tmp_path):
    base = models.save(models.t5(), tmp_path / "base")
    args = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        save_steps=2,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        predict_with_generate=True,
        generation_max_length=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Seq2SeqTrainer(
        model=models.load(base),
        args=args,
        train_dataset=examples(),
        eval_dataset=examples(4),
        callbacks=[here(rank=32, embeddings=True)],
    ).train()
    assert adapters(tmp_path / "run/phlora") == ["final", "step-2", "step-4"]
    for step in (2, 4):
        extract(base, tmp_path / f"run/checkpoint-{step}", 32, embeddings=True).save(tmp_path / f"by-hand-{step}")
        assert same_factors(tmp_path / f"run/phlora/step-{step}", tmp_path / f"by-hand-{step}")
    # At full rank stock PEFT's model holds every matrix of the checkpoint, encoder and decoder.
    got = models.lora_deltas(models.load_adapter(base, tmp_path / "run/phlora/final", tied=True))
    true = models.true_deltas(base, tmp_path / "run/checkpoint-4")
    assert len(got) > 2 * 2 * 6
    for name, delta in got.items():
        assert (delta - true[f"{name}.weight"]).norm() <= 1e-4 * true[f"{name}.weight"].norm()


class Slow(transformers.TrainerCallback):
    """More than a second between saves: with less, rotation does not look at times."""

    def on_save(self, args, state, control, **kwargs):
        time.sleep(1.1)


def test_adapters_outlive_their_checkpoints_and_rotation_is_not_led_astray(base, tmp_path):
    training = trainer(base, tmp_path, here(background=True), Slow(), save_total_limit=2, max_steps=8)
    training.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert adapters(tmp_path / "phlora") == ["final", "step-2", "step-4", "step-6", "step-8"]


def test_checkpoints_are_what_they_are_without_the_callback(base, tmp_path):
    for name, callbacks in {"with": [here()], "without": []}.items():
        torch.manual_seed(0)
        trainer(base, tmp_path / name, *callbacks).train()
    for step in (2, 4, 6):
        one, other = (tmp_path / name / f"checkpoint-{step}" for name in ("with", "without"))
        assert files(one) == files(other)
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "with/checkpoint-6")
    assert not getattr(loaded, "_hf_peft_config_loaded", False)


@pytest.mark.parametrize("load_from", ["base", "checkpoint"])
def test_a_resumed_run_finds_the_same_base_again(base, tmp_path, load_from):
    trainer(base, tmp_path, here(), max_steps=4).train()
    again = base if load_from == "base" else tmp_path / "checkpoint-4"
    trainer(again, tmp_path, here()).train(resume_from_checkpoint=True)
    assert adapters(tmp_path / "phlora") == ["final", "step-2", "step-4", "step-6"]
    extract(base, tmp_path / "checkpoint-6", 8).save(tmp_path / "by-hand")
    assert same_factors(tmp_path / "phlora/step-6", tmp_path / "by-hand")


def test_a_resumed_run_catches_up_with_what_was_saved_without_an_event(base, tmp_path):
    trainer(base, tmp_path, here(when="end"), max_steps=4).train()
    assert adapters(tmp_path / "phlora") == ["final"]
    trainer(base, tmp_path, here()).train(resume_from_checkpoint=True)
    assert adapters(tmp_path / "phlora") == ["final", "step-2", "step-4", "step-6"]


def test_a_checkpoint_without_an_event_is_caught_up_with_at_the_end(base, tmp_path):
    class Sneaky(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                kwargs["model"].save_pretrained(Path(args.output_dir) / "checkpoint-3")

    trainer(base, tmp_path, here(), Sneaky()).train()
    assert adapters(tmp_path / "phlora") == ["final", "step-2", "step-3", "step-4", "step-6"]


def altered(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    return model


@pytest.mark.parametrize("case", ["nameless", "altered", "another shape"])
def test_a_base_that_is_nowhere_on_disk_is_kept_before_the_first_step(base, tmp_path, log, case):
    model = models.llama() if case == "nameless" else transformers.AutoModelForCausalLM.from_pretrained(base)
    if case == "altered":
        altered(model)
    if case == "another shape":
        model.resize_token_embeddings(104)
    model.save_pretrained(tmp_path / "true")
    trainer(model, tmp_path / "run", here()).train()
    assert log.of("the base is", "a snapshot")
    extract(tmp_path / "true", tmp_path / "run/checkpoint-6", 8).save(tmp_path / "by-hand")
    assert same_factors(tmp_path / "run/phlora/step-6", tmp_path / "by-hand")


def test_a_base_in_the_runs_own_folder_is_held_by_links(base, tmp_path, log):
    own = shutil.copytree(base, tmp_path / "run/checkpoint-1")
    trainer(own, tmp_path / "run", here(), save_total_limit=1).train()
    assert log.of("the base is", "links to")
    assert not own.exists()
    extract(base, tmp_path / "run/checkpoint-6", 8).save(tmp_path / "by-hand")
    assert same_factors(tmp_path / "run/phlora/final", tmp_path / "by-hand")


def test_a_callback_added_after_the_trainer_was_made_finds_its_base_too(base, tmp_path):
    training = trainer(base, tmp_path)
    training.add_callback(here())
    training.train()
    assert adapters(tmp_path / "phlora") == ["final", "step-2", "step-4", "step-6"]


def test_one_callback_serves_one_run_after_another(base, tmp_path):
    callback = here(when="end")
    for name in ("one", "two"):
        start = altered(transformers.AutoModelForCausalLM.from_pretrained(base)) if name == "two" else base
        training = trainer(start, tmp_path / name, callback)
        if name == "two":
            training.model.save_pretrained(tmp_path / "altered")
        training.train()
        assert training.state.log_history
    for name, before in {"one": base, "two": tmp_path / "altered"}.items():
        extract(before, tmp_path / name / "checkpoint-6", 8).save(tmp_path / f"by-hand-{name}")
        assert same_factors(tmp_path / name / "phlora/final", tmp_path / f"by-hand-{name}")


def test_a_run_that_was_begun_without_it_says_what_to_give(base, tmp_path, log):
    trainer(base, tmp_path, max_steps=4).train()
    training = trainer(tmp_path / "checkpoint-4", tmp_path)
    training.add_callback(PosthocLoraCallback(8, background=False))
    training.train(resume_from_checkpoint=True)
    assert log.of("begun without the callback", "give `base=`", "Training goes on")
    assert training.state.global_step == STEPS


def test_final_is_the_best_model_where_that_is_loaded_at_the_end(base, tmp_path):
    class Judge(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = abs(state.global_step - 4.0)

    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    training = trainer(base, tmp_path, here(), **options)
    training.callback_handler.callbacks.insert(0, Judge())
    training.train()
    assert training.state.best_model_checkpoint.endswith("checkpoint-4")
    assert same_factors(tmp_path / "phlora/final", tmp_path / "phlora/step-4")
    assert not same_factors(tmp_path / "phlora/final", tmp_path / "phlora/step-6")


@pytest.mark.parametrize("background", [True, False])
def test_without_checkpoints_final_is_made_of_the_live_model(base, tmp_path, background):
    training = trainer(base, tmp_path / "run", here(background=background), save_strategy="no")
    training.train()
    assert adapters(tmp_path / "run/phlora") == ["final"]
    extract(base, training.model, 8).save(tmp_path / "by-hand")
    assert same_factors(tmp_path / "run/phlora/final", tmp_path / "by-hand")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"when": "end"}, ["final"]),
        ({"when": 2}, ["final", "step-4"]),
        ({"keep": 2}, ["final", "step-4", "step-6"]),
        ({"keep": 1}, ["final", "step-6"]),
    ],
)
def test_which_adapters_there_are_is_the_users_choice(base, tmp_path, options, expected):
    trainer(base, tmp_path / "run", here(out=tmp_path / "elsewhere", **options)).train()
    assert adapters(tmp_path / "elsewhere") == expected
    assert not (tmp_path / "run/phlora").exists()


def test_an_energy_share_travels_to_the_other_process(base, tmp_path):
    trainer(base, tmp_path, here(rank=keep_energy(0.7), background=True, when="end", exclude="q_proj")).train()
    report = json.loads((tmp_path / "phlora/final/phlora_report.json").read_text())
    extracted = [row for row in report["rows"] if row["status"] == "extracted"]
    assert extracted
    assert all(0.7 <= row["energy"] < 1 for row in extracted)
    assert not any("q_proj" in row["weight"] for row in extracted)


@pytest.mark.parametrize("background", [True, False])
def test_the_form_is_that_of_every_surface(base, tmp_path, background):
    trainer(base, tmp_path, here(background=background, when="end", form="peft")).train()
    extract(base, tmp_path / "checkpoint-6", 8, form="peft").save(tmp_path / "by-hand")
    assert same_factors(tmp_path / "phlora/final", tmp_path / "by-hand")
    assert json.loads((tmp_path / "phlora/final/adapter_config.json").read_text())["modules_to_save"]
    assert "vllm serve" not in (tmp_path / "phlora/final/README.md").read_text()


# What is logged.


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


# What goes wrong.


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
            running = callback._run._jobs._running
            if running is not None and not self.done:
                self.done = True
                os.kill(running[1].pid, signal.SIGKILL)
                running[1].wait()

    callback = PosthocLoraCallback(8)
    training = trainer(base, tmp_path, callback, Killer(), save_total_limit=1)
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


# What else a run may be.


def test_deepspeeds_own_partitions_are_refused_with_what_to_do(base, tmp_path):
    part = tmp_path / "checkpoint-1/global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"")
    run = Run(tmp_path, here()._request)
    run.base = run_module.Base(str(base), None, "")
    (done,) = run.make(tmp_path / "checkpoint-1", 1)
    assert "stage3_gather_16bit_weights_on_model_save" in done.failure


def test_a_new_head_is_left_out_and_counted(base, tmp_path, log):
    """As in a reward model: the base has `lm_head`, the fine-tune a `score` of its own."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0)
    training = trainer(model, tmp_path, here(rank=32))
    training.train_dataset = [{"input_ids": row["input_ids"], "labels": 1} for row in training.train_dataset]
    training.train()
    assert log.of("the base is", "was loaded from")
    report = json.loads((tmp_path / "phlora/final/phlora_report.json").read_text())
    reasons = {row["weight"]: row["reason"] for row in report["rows"] if row["status"] == "left out"}
    assert reasons["score.weight"] == "only in tuned"
    assert reasons["lm_head.weight"] == "only in base"
    assert any("score.weight" in warning for warning in report["warnings"])
    got = models.lora_deltas(peft_on(model, tmp_path / "phlora/final"))
    assert len(got) == 14
    assert all(delta.any() for delta in got.values())


def peft_on(model, adapter):
    import peft

    return peft.PeftModel.from_pretrained(model, adapter)
