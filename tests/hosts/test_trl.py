"""The callback in TRL's trainers, whose logs hold running averages that others must not flush."""

import json
import warnings

import datasets
import peft
import pytest
import torch
import transformers
import trl
from safetensors.torch import load_file

from hf_callbacks import PosthocLoraCallback
from peft_posthoc import extract
from tests.make import models
from tests.make.texts import PROMPTS, tokenizer

PAIRS = {"chosen": [" w1"] * 32, "rejected": [" w2"] * 32}


def even_words(completions, **_):
    """A reward that differs among samples, so that there is something to learn."""
    return [float(sum(int(word[1:]) % 2 == 0 for word in text.split() if word[0] == "w")) for text in completions]


# Trainer, configuration, what else they are made with, data.
KINDS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, {}, {}, {"text": PROMPTS}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {}, {}, {"prompt": PROMPTS, **PAIRS}),
    "grpo": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        {"reward_funcs": even_words},
        {"num_generations": 2, "max_completion_length": 6},
        {"prompt": PROMPTS},
    ),
    "reward": (
        trl.RewardTrainer,
        trl.RewardConfig,
        {},
        {},
        {key: [f"{PROMPTS[0]}{w}" for w in PAIRS[key]] for key in PAIRS},
    ),
}


def start(kind, base):
    if kind == "reward":
        return transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    return models.load(base)


@pytest.fixture(scope="module", params=KINDS)
def runs(request, llama_pair, tmp_path_factory):
    """(kind, the run's folder, the logs of a run with the callback, those of the same run without it)."""
    folder, logs = tmp_path_factory.mktemp(request.param), []
    make, configure, parts, options, data = KINDS[request.param]
    for callbacks in ([PosthocLoraCallback(8, background=False, strict=True)], []):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TRL uses names that transformers deprecates
            args = configure(
                output_dir=str(folder / ("with" if callbacks else "without")),
                max_steps=6,
                logging_steps=3,
                save_steps=2,
                learning_rate=1e-3,
                per_device_train_batch_size=2,
                use_cpu=True,
                bf16=False,
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
                **options,
            )
            training = make(
                model=start(request.param, llama_pair[0]),
                args=args,
                train_dataset=datasets.Dataset.from_dict(data),
                processing_class=tokenizer(),
                callbacks=callbacks,
                **parts,
            )
            training.train()
        logs.append(training.state.log_history)
    return request.param, folder / "with", *logs


def test_trls_own_logs_are_what_they_are_without_the_callback(runs):
    _, _, ours, without = runs
    theirs = [entry for entry in ours if "phlora/energy" not in entry]
    assert len(theirs) == len(without) < len(ours)
    for one, other in zip(theirs, without, strict=True):
        assert timeless(one) == timeless(other)
    assert [entry["phlora/checkpoint_step"] for entry in ours if "phlora/energy" in entry] == [2, 4, 6]


def test_the_weights_are_bit_for_bit_what_they_are_without_the_callback(runs):
    _, folder, ours, without = runs
    for step in (2, 4, 6):
        path = f"checkpoint-{step}/model.safetensors"
        assert (folder / path).read_bytes() == (folder.with_name("without") / path).read_bytes()
    assert "train_runtime" in ours[-1]
    assert "train_runtime" in without[-1]


def timeless(entry):
    return {key: value for key, value in entry.items() if "time" not in key and "per_second" not in key}


def test_every_checkpoint_has_the_adapter_that_is_made_of_it_by_hand(runs, llama_pair, tmp_path):
    kind, folder, _, _ = runs
    base = llama_pair[0]
    for step in (2, 4, 6):
        extract(base, folder / f"checkpoint-{step}", 8).save(tmp_path / f"step-{step}")
        ours, by_hand = (
            load_file(place / f"step-{step}" / "adapter_model.safetensors") for place in (folder / "phlora", tmp_path)
        )
        assert ours.keys() == by_hand.keys()
        assert all(torch.equal(ours[name], by_hand[name]) for name in ours)
    final = folder / "phlora/final"
    model = (
        peft.PeftModel.from_pretrained(start(kind, base), final)
        if kind == "reward"
        else models.load_adapter(base, final)
    )
    got = models.lora_deltas(model)
    assert len(got) == 14
    assert all(delta.any() for delta in got.values())
    true = {name: delta for name, delta in deltas(base, folder / "checkpoint-6").items() if name in got}
    share = sum((got[name] - true[name]).square().sum() for name in got) / sum(d.square().sum() for d in true.values())
    totals = json.loads((final / "phlora_report.json").read_text())["totals"]
    assert 1 - share == pytest.approx(totals["energy"], abs=1e-4)
    assert totals["energy"] > 0.5


def deltas(base, checkpoint):
    """tuned - base of every linear layer, by module."""
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (base, checkpoint))
    return {name.removesuffix(".weight"): after[name] - before[name] for name in before if name in after}


@pytest.mark.parametrize("runs", ["reward"], indirect=True)
def test_a_reward_head_is_left_out_and_counted(runs):
    _, folder, _, _ = runs
    report = json.loads((folder / "phlora/final/phlora_report.json").read_text())
    reasons = {row["weight"]: row["reason"] for row in report["rows"] if row["status"] == "left out"}
    assert (reasons["score.weight"], reasons["lm_head.weight"]) == ("only in tuned", "only in base")
    assert any("score.weight" in warning for warning in report["warnings"])
