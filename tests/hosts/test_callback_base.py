"""The base that the callback compares with: found, kept, and found again when a run is resumed."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers

from hf_callbacks import PosthocLoraCallback
from peft_posthoc import extract
from tests.make import coded, models
from tests.make.trainer_runs import STEPS, adapters, here, same_factors, trainer


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


def test_a_quantised_folder_is_the_base_of_a_run_that_trains_what_it_computes(tmp_path, log):
    plain = models.llama(hidden_size=64, intermediate_size=128)
    model = models.load(coded.dequantized(coded.save(plain, tmp_path / "base", "nf4"), tmp_path / "plain", plain))
    model.config._name_or_path = str(tmp_path / "base")
    trainer(model, tmp_path / "run", here()).train()
    assert log.of("the base is", "loaded from")
    extract(tmp_path / "base", tmp_path / "run/checkpoint-6", 8).save(tmp_path / "by-hand")
    assert same_factors(tmp_path / "run/phlora/step-6", tmp_path / "by-hand")
    trainer(model, tmp_path / "again", here(base=tmp_path / "base")).train()
    assert log.of("the base is", "given")
