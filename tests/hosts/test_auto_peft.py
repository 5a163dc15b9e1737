"""PEFT's auto classes find the base and its class by the adapter alone."""

import json

import peft
import pytest
import torch
import transformers

from peft_posthoc import extract
from tests.make import models

SMALL = {"num_labels": 3, "pad_token_id": 0}


def classifier():
    return transformers.LlamaForSequenceClassification(models.llama(**SMALL).config)


MODELS = {
    "a causal language model": (models.llama, "AutoPeftModelForCausalLM"),
    "an encoder and decoder": (models.t5, "AutoPeftModelForSeq2SeqLM"),
    "a classifier": (classifier, "AutoPeftModel"),
    "a question answerer": (lambda: transformers.BertForQuestionAnswering(models.bert().config), "AutoPeftModel"),
    "a bare model": (lambda: models.llama().model, "AutoPeftModel"),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("form", ["portable", "peft"])
@pytest.mark.parametrize("name", MODELS)
def test_an_auto_class_finds_the_base(name, form, tmp_path):
    make, auto = MODELS[name]
    pair = models.save_pair(make(), tmp_path)
    extract(*pair, 32, form=form).save(tmp_path / "adapter")
    model = getattr(peft, auto).from_pretrained(tmp_path / "adapter")
    assert (
        type(model.get_base_model()).__name__
        == json.loads((tmp_path / "base/config.json").read_text())["architectures"][0]
    )
    assert all(delta.any() for delta in models.lora_deltas(model).values())


def test_a_reward_model_is_found_by_its_own_class(tmp_path):
    base = models.save(models.llama(**SMALL), tmp_path / "base")
    tuned = transformers.LlamaForSequenceClassification.from_pretrained(base)
    torch.nn.init.normal_(tuned.model.layers[0].mlp.up_proj.weight)
    extract(base, models.save(tuned, tmp_path / "tuned"), 8).save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["task_type"] is None
    assert config["auto_mapping"]["base_model_class"] == "LlamaForSequenceClassification"
