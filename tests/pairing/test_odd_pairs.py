"""Pairs that are not a model and its plain fine-tune, each of which once gave a wrong or no adapter."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file

from peft_posthoc import LoraConfig, MismatchError, extract, get_peft_model, verify
from tests.make import architectures, models

EPS = torch.finfo(torch.float32).eps


def statuses(adapter):
    return {row.weight: row.status for row in adapter.report.rows}


def tensors(folder):
    return load_file(f"{folder}/model.safetensors")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("begin", ["policy.", ""])
def test_experts_are_found_whatever_their_names_begin_with(name, begin, tmp_path):
    base, tuned = architectures.pair_of(name, tmp_path)
    other = {f"{begin}{own.removeprefix('model.')}": tensor for own, tensor in tensors(tuned).items()}
    adapter, plain = extract(base, other, 8, form="peft"), extract(base, tuned, 8, form="peft")
    assert statuses(adapter) == statuses(plain)
    assert all(torch.equal(adapter.factors[own][0], a) for own, (a, _) in plain.factors.items())


def test_of_two_models_in_one_file_none_is_picked(llama_pair):
    base, tuned = llama_pair
    both = {f"{actor}.{own}": tensor.clone() for actor in ("actor", "critic") for own, tensor in tensors(tuned).items()}
    with pytest.raises(MismatchError, match=r"`actor\..*` and `critic\..*` of .* may both be .*rename="):
        extract(base, both, 4)
    assert extract(base, both, 4, rename="^actor.=>").factors.keys() == extract(base, tuned, 4).factors.keys()


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_a_classifier_s_new_layers_are_not_taken_for_the_old_head_s(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")(**architectures.SIZES)
    torch.manual_seed(0)
    base = models.save(getattr(transformers, f"{kind}ForMaskedLM")(config), tmp_path / "base")
    cls = getattr(transformers, f"{kind}ForSequenceClassification")
    started = cls.from_pretrained(base)
    tuned = models.save(models.tuned_from(started), tmp_path / "tuned")
    adapter = extract(base, tuned, 4096, form="peft")
    assert adapter.report.notes == ()
    new = {own for own in tensors(tuned) if own not in tensors(base)}
    assert new
    assert {statuses(adapter)[own] for own in new} == {"whole"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(base), adapter.save(tmp_path / "out")).eval()
    wanted, ids = models.load(tuned), torch.arange(2, 20)[None]
    with torch.no_grad():
        assert (loaded(ids).logits - wanted(ids).logits).norm() < 1e-4 * wanted(ids).logits.norm()


def only(base, tuned, chosen):
    """The base's tensors, but for those chosen, which are the tuned ones."""
    before, after = tensors(base), tensors(tuned)
    return {own: after[own] if chosen(own) else tensor for own, tensor in before.items()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "bert"])
def test_norms_alone_have_an_adapter_in_the_peft_form(name, tmp_path):
    base, tuned = architectures.pair_of(name, tmp_path)
    changed = only(base, tuned, lambda own: "norm" in own.lower())
    adapter = extract(base, changed, 8, form="peft")
    assert (adapter.factors, set(statuses(adapter).values())) == ({}, {"whole", "unchanged"})
    loaded = models.load_adapter(base, adapter.save(tmp_path / "out"), unbiased=True)
    wanted = models.load(base)
    with torch.no_grad():
        for own, parameter in wanted.named_parameters():
            parameter.copy_(changed.get(own, parameter))
    got, want = (architectures.outputs(name, model) for model in (loaded, wanted))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_attention_alone_has_an_adapter_beside_experts_that_have_not_changed(tmp_path):
    base, tuned = architectures.pair_of("gpt_oss", tmp_path)
    adapter = extract(base, only(base, tuned, lambda own: "self_attn" in own), 8, form="peft")
    found = {own: status for own, status in statuses(adapter).items() if status != "unchanged"}
    assert found
    assert set(found.values()) == {"whole"}
    models.load_adapter(base, adapter.save(tmp_path / "out"))


def test_ranks_by_hand_are_for_all_experts_of_a_parameter(tmp_path):
    base, tuned = architectures.pair_of("mixtral", tmp_path)
    adapter = extract(base, tuned, 8, experts="fused", rank_pattern={"experts.gate_up_proj": 2})
    ranks = {row.weight.partition("[")[0].rpartition(".")[2]: row.rank for row in adapter.report.rows if row.rank}
    assert (ranks["gate_up_proj"], ranks["down_proj"]) == (2, 8)


def test_from_delta_takes_convolutions(tmp_path):
    base, tuned = architectures.pair_of("resnet", tmp_path)
    with pytest.warns(UserWarning, match="is left out in"):
        config = LoraConfig.from_delta(base, tuned, 999, target_modules=["convolution"])
    model = get_peft_model(models.load(base), config, init="posthoc").merge_and_unload()
    wanted = dict(models.load(tuned).named_parameters())
    found = {own: parameter for own, parameter in model.named_parameters() if own.endswith("convolution.weight")}
    assert found
    assert all((found[own] - wanted[own]).norm() < 100 * EPS * wanted[own].norm() for own in found)


def test_positions_are_no_vocabulary(tmp_path):
    base = models.gpt2().state_dict()
    tuned = {own: tensor.clone() for own, tensor in base.items()}
    tuned["transformer.wpe.weight"] = torch.randn(2 * len(base["transformer.wpe.weight"]), 32)
    models.save(models.gpt2(), tmp_path / "base")
    with pytest.raises(MismatchError, match="1 tensor has another shape"):
        extract(tmp_path / "base", tuned, 4, vocab="truncate")


@pytest.mark.parametrize("form", ["peft", "portable"])
def test_experts_without_a_configuration(form, tmp_path):
    """Nobody knows how they are stacked, and their router is no plain layer."""
    base, tuned = (tensors(folder) for folder in architectures.pair_of("qwen2_moe", tmp_path))
    if form == "peft":
        with pytest.raises(MismatchError, match=r"only its class knows: give a folder with config\.json"):
            extract(base, tuned, 4, form="peft")
    modules = extract(base, tuned, 4, form=form, experts="none").factors
    assert modules
    assert not any(module.endswith(".gate") or ".experts." in module for module in modules)


def test_what_peft_would_misread_is_left_out_and_told(tmp_path):
    """A bare ViT's `embeddings` end the name of `embeddings.patch_embeddings` too."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    base, tuned = models.save_pair(transformers.ViTModel(config), tmp_path)
    adapter = extract(base, tuned, 4, form="peft")
    left = {row.reason for row in adapter.report.rows if row.status == "left out"}
    assert left == {"PEFT would take the name of its module, `embeddings`, to mean `embeddings.patch_embeddings` too"}
    assert verify(adapter.save(tmp_path / "out"), base, tuned, outputs=False).energy > 0.1


def test_one_class_under_two_model_types_is_one_model(llama_pair, tmp_path):
    base, tuned = llama_pair
    other = tmp_path / "tuned"
    shutil.copytree(tuned, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama_nemotron"}))
    adapter, plain = extract(base, other, 4), extract(base, tuned, 4)
    assert statuses(adapter) == statuses(plain)
    assert all(torch.equal(adapter.factors[own][0], a) for own, (a, _) in plain.factors.items())
    (other / "config.json").write_text(
        json.dumps(config | {"model_type": "llama_nemotron", "architectures": ["Llama2"]})
    )
    with pytest.raises(MismatchError, match="Two different architectures"):
        extract(base, other, 4)
