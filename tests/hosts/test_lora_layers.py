"""A configuration with a delta leads to it by whatever call of PEFT, transformers or TRL, or changes nothing."""

import copy
import json
import pickle
import warnings

import datasets
import peft
import pytest
import torch
import transformers
import trl

from peft_posthoc import AdapterError, LoraConfig, add_adapter, get_peft_model
from tests.make import models
from tests.make.texts import PROMPTS, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*(left out|base's norm|second time|Already found|was renamed)")


@pytest.fixture
def config(llama_pair):
    return LoraConfig.from_delta(*llama_pair, r=32)


def by_trl(model, config, tmp_path):
    data = datasets.Dataset.from_dict({"text": PROMPTS})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL uses names that transformers deprecates
        args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
        return trl.SFTTrainer(
            model=model, args=args, train_dataset=data, processing_class=tokenizer(), peft_config=config
        ).model


def by_transformers(model, config, tmp_path):
    model.add_adapter(config)
    return model


def beside_another(model, config, tmp_path):
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"]), "first")
    made.add_adapter("default", config)
    return made


WAYS = {
    "our get_peft_model": lambda model, config, tmp_path: get_peft_model(model, config),
    "PEFT's get_peft_model": lambda model, config, tmp_path: peft.get_peft_model(model, config),
    "a mixed model": lambda model, config, tmp_path: peft.get_peft_model(model, config, mixed=True),
    "injected": lambda model, config, tmp_path: peft.inject_adapter_in_model(config, model),
    "a copied configuration": lambda model, config, tmp_path: peft.get_peft_model(model, copy.deepcopy(config)),
    "another process": lambda model, config, tmp_path: peft.get_peft_model(model, pickle.loads(pickle.dumps(config))),
    "beside another adapter": beside_another,
    "transformers": by_transformers,
    "TRL": by_trl,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_an_adapter_leads_to_the_delta(way, config, llama_pair, tmp_path):
    made = WAYS[way](models.load(llama_pair[0]), config, tmp_path)
    assert_delta(made, llama_pair)


def assert_delta(model, pair, adapter_name="default", modules=14):
    true = models.true_deltas(*pair)
    got = {name: delta for name, delta in models.lora_deltas(model, adapter_name).items() if delta.any()}
    assert len(got) == modules
    for name, delta in got.items():
        torch.testing.assert_close(delta.cpu(), true[f"{name}.weight"], rtol=0, atol=2e-6)


def test_factors_that_peft_makes_wider_are_not_rounded_before(llama_pair, config):
    model = peft.get_peft_model(models.load(llama_pair[0]).to(torch.bfloat16), config)
    true = models.true_deltas(*llama_pair)
    for name, layer in model.base_model.model.named_modules():
        if name.endswith("_proj"):
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            torch.testing.assert_close(product.detach(), true[f"{name}.weight"], rtol=0, atol=2e-6)


def test_a_classifier_has_the_head_of_the_fine_tune_where_peft_keeps_it_whole(tmp_path):
    pair = models.save_pair(transformers.LlamaForSequenceClassification(models.llama(num_labels=3).config), tmp_path)
    config = LoraConfig.from_delta(*pair, r=32, task_type="SEQ_CLS")
    base, tuned = map(transformers.AutoModelForSequenceClassification.from_pretrained, pair)
    model = peft.get_peft_model(base, config)
    head = model.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(head, tuned.score.weight)


def test_a_copy_without_its_delta_does_not_start_from_zero(llama_pair, config):
    for kind in (LoraConfig, peft.LoraConfig):
        bare = kind(**{name: value for name, value in config.to_dict().items() if name != "peft_type"})
        model = models.load(llama_pair[0])
        with pytest.raises(AdapterError, match="a copy without the delta"):
            peft.get_peft_model(model, bare)
        assert not any("lora_" in name for name, _ in model.named_parameters())


def test_what_is_saved_is_plain_and_has_trained_on(llama_pair, config, tmp_path):
    model = peft.get_peft_model(models.load(llama_pair[0]), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    again = peft.PeftModel.from_pretrained(models.load(llama_pair[0]), tmp_path)
    for name, delta in models.lora_deltas(model).items():
        assert torch.equal(models.lora_deltas(again)[name], delta)


def test_configurations_without_a_delta_start_where_they_did(llama_pair, config):
    torch.manual_seed(0)
    model = peft.get_peft_model(models.load(llama_pair[0]), peft.LoraConfig(target_modules=["q_proj"]))
    assert all(not delta.any() for delta in models.lora_deltas(model).values())
    assert all(p.any() for name, p in model.named_parameters() if "lora_A" in name)


@pytest.mark.parametrize("host", ["PEFT", "transformers"])
def test_a_second_delta_goes_beside_the_first(host, llama_pair, config, tmp_path):
    model = models.load(llama_pair[0])
    other = models.save(models.tuned_from(models.load(llama_pair[0]), scale=0.05), tmp_path / "other")
    second = LoraConfig.from_delta(llama_pair[0], other, r=32, target_modules=["q_proj", "down_proj"])
    if host == "PEFT":
        model = peft.get_peft_model(model, config)
        with pytest.raises(ValueError, match=r"`peft_posthoc\.add_adapter` puts another one beside it"):
            get_peft_model(model, second, "second", init="posthoc")
    else:
        model.add_adapter(config)
    add_adapter(model, "second", second)
    assert_delta(model, llama_pair)
    assert_delta(model, (llama_pair[0], other), "second", modules=4)


FIRST = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)


@pytest.mark.parametrize("case", ["PEFT", "PEFT, a second", "transformers", "transformers, a second"])
def test_a_delta_that_does_not_fit_leaves_the_model_as_it_was(case, llama_pair):
    model = models.load(llama_pair[0])
    add = peft.get_peft_model if case == "PEFT" else lambda model, config: add_adapter(model, "second", config)
    if case == "PEFT, a second":
        model = peft.get_peft_model(model, FIRST, "first")
    elif case == "transformers, a second":
        model.add_adapter(FIRST, "first")
    before, trained = model.state_dict(), {name: p.requires_grad for name, p in model.named_parameters()}
    outputs = model(torch.arange(9)[None]).logits
    config = LoraConfig.from_delta(*llama_pair, r=8)
    wanted, config.target_modules = config.target_modules, {"q_proj"}  # so that there is no layer for the others
    with pytest.raises(AdapterError, match="no layer for 12 of the factors"):
        add(model, config)
    assert model.state_dict().keys() == before.keys()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert torch.equal(model(torch.arange(9)[None]).logits, outputs)
    config.target_modules = wanted
    add(model, config)


def test_the_name_of_an_adapter_that_is_there_is_not_taken_over(llama_pair, config):
    model = peft.get_peft_model(models.load(llama_pair[0]), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="has an adapter `default` already"):
        peft.get_peft_model(model, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fine_tune_is_not_given_its_own_delta_again(dtype, llama_pair, config):
    model = models.load(llama_pair[1]).to(dtype)
    with pytest.raises(AdapterError, match="already: the delta would be added twice"):
        peft.get_peft_model(model, config)
    assert not any("lora_" in name for name, _ in model.named_parameters())
    peft.get_peft_model(models.load(llama_pair[0]).to(dtype), config)


def test_another_base_is_told(config):
    torch.manual_seed(9)
    with pytest.warns(UserWarning, match="does not hold the weights of"):
        peft.get_peft_model(models.llama(), config)
    with pytest.raises(ValueError, match="needs a configuration made by"):
        add_adapter(models.llama(), "mine", peft.LoraConfig())
