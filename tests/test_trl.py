"""The callback in TRL's trainers, whose logs hold running averages that others must not flush."""

import warnings

import datasets
import pytest
import tokenizers
import transformers
import trl

from hf_callbacks import PosthocLoraCallback
from tests import models


@pytest.fixture(scope="module")
def tokenizer():
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(94))])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def texts(start):
    return " ".join(f"w{(start + 7 * i) % 94}" for i in range(12))


def sft():
    data = datasets.Dataset.from_dict({"text": [texts(i) for i in range(32)]})
    return trl.SFTTrainer, trl.SFTConfig, data


def dpo():
    rows = {"prompt": [texts(i) for i in range(32)], "chosen": [" w1"] * 32, "rejected": [" w2"] * 32}
    return trl.DPOTrainer, trl.DPOConfig, datasets.Dataset.from_dict(rows)


@pytest.mark.parametrize("kind", [sft, dpo], ids=["sft", "dpo"])
def test_trls_own_logs_are_what_they_are_without_the_callback(kind, llama_pair, tokenizer, tmp_path):
    logs = {}
    for name, callbacks in {
        "with": [PosthocLoraCallback(8, background=False, strict=True)],
        "without": [],
    }.items():
        make, configure, data = kind()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TRL uses names that transformers deprecates
            args = configure(
                output_dir=str(tmp_path / name),
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
            )
            training = make(
                model=models.load(llama_pair[0]),
                args=args,
                train_dataset=data,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
            training.train()
        logs[name] = training.state.log_history
    theirs = [entry for entry in logs["with"] if "phlora/energy" not in entry]
    assert len(theirs) == len(logs["without"]) < len(logs["with"])
    for one, other in zip(theirs, logs["without"], strict=True):
        assert timeless(one) == timeless(other)
    assert [entry["phlora/checkpoint_step"] for entry in logs["with"] if "phlora/energy" in entry] == [2, 4, 6]
    assert (tmp_path / "with/phlora/final/adapter_model.safetensors").is_file()


def timeless(entry):
    return {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
