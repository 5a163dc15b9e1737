"""One reader: stock PEFT and every surface make the same weights of the same adapter folder."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import AdapterError, check, combine, export, open_checkpoint, resize, verify
from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.adapters.reader import LoraFolder
from peft_posthoc.models.find import layout_of
from peft_posthoc.resizing.resize import spectra
from tests.make import architectures, models
from tests.make.lora import trained

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def saving_embeddings(folder, model):
    """Saved as PEFT does where it thinks that the vocabulary was changed: whole, though nothing adapts them."""
    with torch.no_grad():
        for name in ("embed_tokens.weight", "lm_head.weight"):
            for own, parameter in model.named_parameters():
                if own.endswith(name):
                    parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=True)


def moving_biases(folder, model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter += torch.randn_like(parameter)
    model.save_pretrained(folder)


def in_dtypes(folder, model):
    path = folder / "adapter_model.safetensors"
    tensors = {
        name: tensor.to(torch.float64 if "lora_A" in name else torch.bfloat16)
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path)


def edited(**fields):
    def edit(folder, model):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def conv():
    return architectures.ARCHITECTURES["resnet"].make()


def tied():
    return models.llama(tie_word_embeddings=True)


# By case: the model, what PEFT is asked for, and what becomes of the folder then.
CASES = {
    "plain": (models.llama, {}, None),
    "patterns": (
        models.llama,
        {"rank_pattern": {"q_proj": 2, r"0\.mlp\.down_proj": 7}, "alpha_pattern": {"v_proj": 5}, "lora_alpha": 3},
        None,
    ),
    "an empty alpha_pattern": (models.llama, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {}}, None),
    "rslora": (models.llama, {"lora_alpha": 3, "use_rslora": True, "rank_pattern": {"q_proj": 2}}, None),
    "without r and lora_alpha": (models.llama, {"r": 8, "lora_alpha": 8}, "default"),
    "embeddings": (models.llama, {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "lora_alpha": 3}, None),
    "embeddings and head saved": (models.llama, {}, saving_embeddings),
    "modules_to_save": (models.llama, {"modules_to_save": ["lm_head", "input_layernorm"]}, None),
    "biases": (models.qwen2, {"bias": "all", "target_modules": ["q_proj", "down_proj"]}, moving_biases),
    "biases of LoRA": (models.qwen2, {"lora_bias": True, "lora_alpha": 3, "target_modules": ["q_proj"]}, None),
    "tied": (tied, {"lora_alpha": 3}, None),
    "stacked experts": (
        models.qwen3_moe,
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "lora_alpha": 3},
        None,
    ),
    "one of two stacks": (models.mixtral, {"target_modules": [], "target_parameters": EXPERTS[1:]}, None),
    "convolutions": (conv, {"target_modules": ["convolution"], "lora_alpha": 3}, None),
    "Conv1D": (models.gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}, None),
    "odd dtypes": (models.llama, {"lora_alpha": 3}, in_dtypes),
}


class Case:
    """An adapter on disk, its base, and what stock PEFT makes of the two."""

    def __init__(self, name, folder):
        make, fields, spoil = CASES[name]
        self.base = str(models.save(make(), folder / "base"))
        self.adapter = folder / "lora"
        model = trained(self.base, self.adapter, **fields)
        if spoil == "default":
            path = self.adapter / "adapter_config.json"
            config = json.loads(path.read_text())
            path.write_text(json.dumps({key: value for key, value in config.items() if key not in ("r", "lora_alpha")}))
        elif spoil is not None:
            spoil(self.adapter, model)
        self.before = parameters(models.load(self.base))
        self.merged = by_peft(self.base, self.adapter)
        self.after = parameters(self.merged)


def parameters(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters(remove_duplicate=False)}


def by_peft(base, adapter):
    """The model that stock PEFT loads and merges."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(models.load(base), str(adapter)).merge_and_unload()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    torch.manual_seed(0)
    return Case(request.param, tmp_path_factory.mktemp("case"))


def assert_same(found, case):
    """Two sets of weights, of which the second moved somewhere."""
    assert found.keys() == case.after.keys()
    for name, wanted in case.after.items():
        torch.testing.assert_close(found[name].float(), wanted.float(), rtol=1e-5, atol=2e-6, msg=name)
    moved = [name for name in case.before if not torch.equal(case.before[name], case.after[name])]
    assert moved


def test_factors_are_what_peft_adds(case):
    folder, checkpoint = LoraFolder(case.adapter), open_checkpoint(case.base)
    on = AdapterOnModel(folder, checkpoint, layout_of(checkpoint))
    for module in folder.modules.values():
        if module.kind == "experts" or f"{module.name}.weight" in on.whole:
            continue  # Held against PEFT by all that is below.
        name = f"{module.name}.weight"
        (factors,) = folder.factors(module.name)
        before = on.folder.tensor(on.base_layers[name]) if name in on.base_layers else case.before[name]
        delta = case.after[name] - before.float()
        product = on.slots[module.name].kind.weight(factors.b @ factors.a, tuple(delta.shape))
        torch.testing.assert_close(product.float(), delta, rtol=1e-4, atol=2e-6, msg=name)
    for name, key in on.whole.items():
        assert torch.equal(folder.tensor(key).float(), case.after[name])


def test_base_and_adapter_as_a_source_are_what_peft_merges(case, tmp_path):
    source = open_checkpoint(f"{case.base}+{case.adapter}")
    model = models.load(case.base)
    save_file(
        {name: source.read(name).clone() for name in source.headers}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    model.config.save_pretrained(tmp_path)
    assert_same(parameters(type(model).from_pretrained(tmp_path, dtype=torch.float32)), case)


def test_the_merged_export_is_what_peft_merges(case, tmp_path):
    export(case.adapter, tmp_path / "out", "merged", base=case.base)
    assert_same(parameters(models.load(tmp_path / "out")), case)


def test_resized_at_full_rank_it_is_the_same(case, tmp_path):
    resize(case.adapter, 1.0, dtype=torch.float32).save(tmp_path / "out")
    assert_same(parameters(by_peft(case.base, tmp_path / "out")), case)
    assert {*LoraFolder(tmp_path / "out").whole} == {*LoraFolder(case.adapter).whole}


def test_two_halves_of_it_are_the_same(case, tmp_path):
    combine([case.adapter, case.adapter], [0.5, 0.5], dtype=torch.float32).save(tmp_path / "out")
    assert_same(parameters(by_peft(case.base, tmp_path / "out")), case)


def test_verify_finds_nothing_that_it_does_not_explain(case, tmp_path):
    tuned = models.save(case.merged, tmp_path / "tuned")
    found = verify(case.adapter, case.base, tuned, outputs=False)
    assert found.energy == pytest.approx(1, abs=1e-6)
    assert found.cosine == pytest.approx(1, abs=1e-6)


# Refused, by all in the same words.


def surfaces(adapter, base, out):
    """Everything that reads an adapter, by what it is called."""
    return {
        "BASE+ADAPTER": lambda: open_checkpoint(f"{base}+{adapter}"),
        "verify": lambda: verify(adapter, base, base, outputs=False),
        "export": lambda: export(adapter, out, "merged", base=base),
        "resize": lambda: resize(adapter, 2),
        "combine": lambda: combine([adapter]),
        "spectra": lambda: spectra(adapter),
    }


REFUSED = {
    "another rank": (edited(r=3), "and not of rank 3, as its configuration says: PEFT does not load it"),
    "another rank by a pattern": (edited(rank_pattern={"q_proj": 2}), "`, and not of rank 2"),
    "DoRA": (edited(use_dora=True), "is no plain LoRA delta: its configuration sets `use_dora`"),
    "PiSSA": (edited(init_lora_weights="pissa"), "is no plain LoRA delta: its configuration sets `init_lora_weights`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_rightly_is_refused_by_all_in_the_same_words(name, llama_pair, tmp_path):
    spoil, reason = REFUSED[name]
    folder = tmp_path / "lora"
    spoil(folder, trained(llama_pair[0], folder))
    said = set()
    for call in surfaces(folder, llama_pair[0], tmp_path / "out").values():
        with pytest.raises(AdapterError, match=reason) as caught:
            call()
        said.add(str(caught.value))
    assert len(said) == 1


def test_factors_of_another_rank_than_the_configuration_s_are_what_peft_does_not_load(llama_pair, tmp_path):
    trained(llama_pair[0], tmp_path / "lora")
    edited(r=3)(tmp_path / "lora", None)
    with pytest.raises(RuntimeError, match="size mismatch"):
        by_peft(llama_pair[0], tmp_path / "lora")
    (peft_s,) = check(tmp_path / "lora", engines=["peft"]).outcomes
    assert any("4 instead of 3" in str(finding) for finding in peft_s.findings)


def test_experts_of_another_number_are_refused(tmp_path):
    base = models.save(models.qwen3_moe(num_experts=4), tmp_path / "base")
    other = models.save(models.qwen3_moe(), tmp_path / "other")
    trained(base, tmp_path / "lora", target_modules=["q_proj"], target_parameters=EXPERTS)
    with pytest.raises(AdapterError, match=r"has factors for 4 matrices of .*; the base `.*` has 2"):
        open_checkpoint(f"{other}+{tmp_path / 'lora'}")


def test_a_parameter_is_told_by_whole_parts_of_its_name(llama_pair, tmp_path):
    """`roj.weight` of `target_parameters` means no `q_proj`, and `weight`, of the model itself, no module at all."""
    trained(llama_pair[0], tmp_path / "lora")
    plain = LoraFolder(tmp_path / "lora").modules
    edited(target_parameters=["roj.weight", "weight", "er_proj.w"])(tmp_path / "lora", None)
    read = LoraFolder(tmp_path / "lora")
    assert read.modules == plain
    assert {module.kind for module in read.modules.values()} == {"linear"}
