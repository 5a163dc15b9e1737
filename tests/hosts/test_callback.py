"""The Trainer's callback, in real runs of the real Trainer: every checkpoint gets its adapter."""

import json
import time

import pytest
import torch
import transformers

from hf_callbacks import run as run_module
from hf_callbacks.run import Run
from peft_posthoc import extract
from peft_posthoc.ranks.rules import keep_energy
from tests.make import models
from tests.make.trainer_runs import STEPS, adapters, examples, files, here, same_factors, trainer


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
