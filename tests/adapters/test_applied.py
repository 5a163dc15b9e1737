"""Base + adapter as a source: what stock PEFT computes with the two, tensor by tensor; and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import AdapterError, CheckpointError, extract, open_checkpoint, verify
from peft_posthoc.adapters.applied import Applied
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.sources import sides
from tests.make import architectures, models
from tests.make.lora import LEAVES, merged, trained


def read(checkpoint):
    """All tensors; their headers must have told what they are."""
    tensors = {name: checkpoint.read(name) for name in checkpoint.headers}
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == dict(checkpoint.headers)
    return tensors


@pytest.fixture
def base(llama_pair):
    return llama_pair[0]


FIELDS = {
    "plain": {},
    "scaled": {"lora_alpha": 3},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, r"0\.mlp\.down_proj": 7}, "alpha_pattern": {"v_proj": 5}},
    "whole modules": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "lora_alpha": 3},
    "rows": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_each_tensor_is_what_stock_peft_merges(fields, base, tmp_path):
    expected = merged(trained(base, tmp_path / "lora", **fields))
    checkpoint = open_checkpoint(f"{base}+{tmp_path / 'lora'}")
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.label == f"{base}+{tmp_path / 'lora'}"
    tensors = read(checkpoint)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    # The other reader of the same files, which knows of none of this, comes to the same.
    assert verify(tmp_path / "lora", base, checkpoint, outputs=False).energy == pytest.approx(1, abs=1e-6)
    plain = open_checkpoint(base)
    assert any((tensors[name] - plain.read(name)).norm() > 0.1 for name in plain.headers)


@pytest.mark.parametrize("make", [models.gpt2, models.qwen2, models.t5, models.bert])
def test_names_on_disk_are_found_from_those_in_the_adapter(make, tmp_path):
    # GPT-2 stores its matrices in x out; Qwen2 has biases; T5 shares one matrix three times over.
    targets = {"gpt2": ["c_attn", "mlp.c_proj"], "qwen2": LEAVES, "t5": ["q", "wo"], "bert": ["query", "output.dense"]}
    bias = {"lora_bias": make is models.qwen2, "bias": "none"}
    target = targets[make.__name__] if make is not models.qwen2 else ["q_proj", "v_proj"]
    base = models.save(make(), tmp_path / "base")
    expected = merged(trained(base, tmp_path / "lora", target_modules=target, **bias))
    tensors = read(open_checkpoint(f"{base}+{tmp_path / 'lora'}"))
    assert len(tensors) == len(open_checkpoint(base).headers)
    changed = 0
    for name, tensor in tensors.items():
        own = name if name in expected else f"transformer.{name}"
        torch.testing.assert_close(tensor, expected[own], rtol=1e-6, atol=1e-6, msg=name)
        changed += not torch.equal(tensor, open_checkpoint(base).read(name))
    assert changed >= 4


def test_what_the_adapter_adds_is_not_rounded_to_the_base_s_dtype(llama_pair, tmp_path):
    base = models.save(models.load(llama_pair[0]).to(torch.bfloat16), tmp_path / "base")
    theirs = models.lora_deltas(trained(base, tmp_path / "lora"))
    before, after = open_checkpoint(base), open_checkpoint(f"{base}+{tmp_path / 'lora'}")
    for module, delta in theirs.items():
        name = f"{module}.weight"
        assert (before.headers[name].dtype, after.headers[name].dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(after.read(name) - before.read(name).float(), delta, rtol=1e-5, atol=1e-6)
        rounded = after.read(name).bfloat16().float() - before.read(name).float()
        assert not torch.allclose(rounded, delta, rtol=1e-5, atol=1e-6)
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert after.headers[untouched].dtype is torch.bfloat16


def test_an_adapter_is_extracted_again_from_what_it_makes_of_its_base(base, tmp_path):
    theirs = models.lora_deltas(trained(base, tmp_path / "lora", lora_alpha=3))
    found = extract(base, f"{base}+{tmp_path / 'lora'}", 4)
    found.save(tmp_path / "again")
    ours = models.lora_deltas(models.load_adapter(base, tmp_path / "again"))
    assert theirs.keys() <= ours.keys()
    for module, delta in ours.items():
        torch.testing.assert_close(delta, theirs.get(module, torch.zeros_like(delta)), rtol=1e-4, atol=1e-5)
    assert {row.weight for row in found.report.rows} == set(open_checkpoint(base).headers)
    result = verify(tmp_path / "again", base, f"{base}+{tmp_path / 'lora'}")
    assert result.cosine == pytest.approx(1, abs=1e-6)


def test_an_adapter_on_either_side_and_on_both(base, tmp_path):
    first = models.lora_deltas(trained(base, tmp_path / "first"))
    second = models.lora_deltas(trained(base, tmp_path / "second"))
    both = [f"{base}+{tmp_path / name}" for name in ("first", "second")]
    differences = models_of(extract(*both, 8))
    stacked = models_of(extract(both[0], f"{both[0]}+{tmp_path / 'second'}", 8))
    for module in first:
        torch.testing.assert_close(differences[module], second[module] - first[module], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(stacked[module], second[module], rtol=1e-3, atol=1e-5)


def models_of(adapter):
    """By module, b @ a."""
    return {module: b @ a for module, (a, b) in adapter.factors.items()}


def test_a_base_that_the_adapter_does_not_name_is_noted(base, tmp_path):
    trained(base, tmp_path / "lora")
    edit(tmp_path / "lora", base_model_name_or_path="org/other")
    notes = extract(base, f"{base}+{tmp_path / 'lora'}", 4).report.notes
    assert f"The adapter names `org/other` as its base, and `{base}` was given." in notes
    edit(tmp_path / "lora", base_model_name_or_path=f"{base}/")
    assert not any("names" in note for note in extract(base, f"{base}+{tmp_path / 'lora'}", 4).report.notes)


# An adapter alone.


def test_an_adapter_alone_is_on_the_base_that_it_names(base, tmp_path):
    trained(base, tmp_path / "lora")
    alone, both = open_checkpoint(tmp_path / "lora"), open_checkpoint(f"{base}+{tmp_path / 'lora'}")
    assert alone.label == both.label == f"{base}+{tmp_path / 'lora'}"
    assert all(torch.equal(alone.read(name), both.read(name)) for name in both.headers)


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("/gone/llama", r"of `/gone/llama`, which is not there"),
        (None, "does not name its base"),
        ("", "does not name its base"),
        (["a"], "does not name its base"),
        ("itself", "which is an adapter too"),
    ],
)
def test_no_base_is_guessed(named, told, base, tmp_path):
    where = tmp_path / "lora"
    trained(base, where)
    edit(where, base_model_name_or_path=str(where) if named == "itself" else named)
    with pytest.raises((AdapterError, CheckpointError), match=rf"`{where}` is a LoRA adapter.*{told}.*BASE\+{where}"):
        open_checkpoint(where)


def test_a_base_that_is_on_the_hub_and_cannot_be_had_is_named(base, tmp_path):
    trained(base, tmp_path / "lora")
    edit(tmp_path / "lora", base_model_name_or_path="nobody/nothing")
    with pytest.raises(CheckpointError, match="`nobody/nothing`") as caught:
        open_checkpoint(tmp_path / "lora")
    assert "BASE+" in caught.value.__notes__[0]


def test_whole_weights_beside_an_adapter_are_taken_for_what_they_are(base, tmp_path):
    trained(base, tmp_path / "both")
    shutil.copy(f"{base}/model.safetensors", tmp_path / "both")
    assert type(open_checkpoint(tmp_path / "both")).__name__ == "Folder"


def edit(adapter, **fields):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# `BASE+ADAPTER` in words.


def test_a_plus_in_a_path_is_part_of_it(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "c++")
    trained("c++", tmp_path / "lo+ra")
    assert open_checkpoint("c++").label == "c++"
    assert sides("c++") is None
    assert sides("c+++lo+ra") == ("c++", "lo+ra")
    assert isinstance(open_checkpoint("c+++lo+ra"), Applied)
    assert sides("org/base+org/lora") == ("org/base", "org/lora")
    assert sides("+lo+ra") is None
    with pytest.raises(CheckpointError, match=r"`c\+\+\+\./gone` does not exist.*BASE\+ADAPTER"):
        open_checkpoint("c+++./gone")


def test_a_model_right_of_the_plus_is_no_adapter(llama_pair):
    with pytest.raises(AdapterError, match=r"right of the `\+`, is no adapter"):
        open_checkpoint("+".join(llama_pair))


def test_a_revision_belongs_to_neither(base, tmp_path):
    trained(base, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"A revision .* belongs to a hub id"):
        open_checkpoint(f"{base}+{tmp_path / 'lora'}", revision="v1")


def test_the_identity_changes_with_either_side(base, tmp_path):
    trained(base, tmp_path / "lora")
    source = f"{base}+{tmp_path / 'lora'}"
    before = open_checkpoint(source).identity
    assert json.loads(json.dumps(before)) == before == open_checkpoint(source).identity
    edit(tmp_path / "lora", lora_alpha=17)
    assert open_checkpoint(source).identity != before


# What shares a tensor, and what only the adapter has.


def test_a_head_that_is_adapted_alone_is_no_longer_the_embeddings(tied_pair, tmp_path):
    base = tied_pair[0]
    assert "lm_head.weight" not in open_checkpoint(base).headers
    delta = models.lora_deltas(trained(base, tmp_path / "lora", target_modules=["q_proj", "lm_head"]))["lm_head"]
    before, after = open_checkpoint(base), open_checkpoint(f"{base}+{tmp_path / 'lora'}")
    shared = before.read("model.embed_tokens.weight")
    assert torch.equal(after.read("model.embed_tokens.weight"), shared)
    torch.testing.assert_close(after.read("lm_head.weight"), shared + delta, rtol=1e-6, atol=1e-6)
    rows = {row.weight: row for row in extract(base, f"{base}+{tmp_path / 'lora'}", 4).report.rows}
    assert rows["lm_head.weight"].reason == "only in tuned"


def test_a_head_that_is_kept_whole_is_no_longer_the_embeddings(tied_pair, tmp_path):
    model = trained(tied_pair[0], tmp_path / "lora", modules_to_save=["lm_head"])
    after = open_checkpoint(f"{tied_pair[0]}+{tmp_path / 'lora'}")
    assert torch.equal(after.read("lm_head.weight"), merged(model)["lm_head.weight"])
    assert not torch.equal(after.read("lm_head.weight"), after.read("model.embed_tokens.weight"))


def test_embeddings_and_head_that_change_alike_stay_one(tied_pair, tmp_path):
    extract(*tied_pair, 4, embeddings=True).save(tmp_path / "lora")
    before, after = open_checkpoint(tied_pair[0]), open_checkpoint(f"{tied_pair[0]}+{tmp_path / 'lora'}")
    assert after.headers.keys() == before.headers.keys()
    assert not torch.equal(after.read("model.embed_tokens.weight"), before.read("model.embed_tokens.weight"))


def test_a_bias_of_lora_where_the_base_has_none_is_a_tensor_of_its_own(base, tmp_path):
    model = trained(base, tmp_path / "lora", lora_bias=True, lora_alpha=2)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    after = open_checkpoint(f"{base}+{tmp_path / 'lora'}")
    bias = after.read("model.layers.0.self_attn.q_proj.bias")
    torch.testing.assert_close(bias, layer.lora_B["default"].bias.detach() * 2 / 4)
    assert bias.any()
    assert len(after.headers) == len(open_checkpoint(base).headers) + 6


def test_biases_that_peft_trained_in_place_are_taken(tmp_path):
    base = models.save(models.qwen2(), tmp_path / "base")
    model = trained(base, tmp_path / "lora", target_modules=["q_proj"], bias="all")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "lora")
    expected = merged(model)
    tensors = read(open_checkpoint(f"{base}+{tmp_path / 'lora'}"))
    for name in tensors:
        torch.testing.assert_close(tensors[name], expected[name], rtol=1e-6, atol=1e-6, msg=name)
    assert tensors["model.layers.0.self_attn.k_proj.bias"].any()


def test_a_new_head_is_in_the_tuned_model_alone(base, tmp_path):
    trained(base, tmp_path / "lora")
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    save_file(
        weights | {"base_model.model.score.weight": torch.ones(2, 32)}, tmp_path / "lora" / "adapter_model.safetensors"
    )
    edit(tmp_path / "lora", modules_to_save=["score"])
    after = open_checkpoint(f"{base}+{tmp_path / 'lora'}")
    assert torch.equal(after.read("score.weight"), torch.ones(2, 32))


def test_embeddings_of_a_larger_vocabulary_are_taken_whole(base, tmp_path):
    trained(base, tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    larger = {f"base_model.model.{name}.weight": torch.randn(99, 32) for name in ("model.embed_tokens", "lm_head")}
    save_file(load_file(path) | larger, path)
    after = open_checkpoint(f"{base}+{tmp_path / 'lora'}")
    assert after.headers["lm_head.weight"].shape == (99, 32)
    assert torch.equal(after.read("lm_head.weight"), larger["base_model.model.lm_head.weight"])


def test_factors_of_embeddings_of_a_larger_vocabulary_are_added_to_those(base, tmp_path):
    larger = models.load(base)
    larger.resize_token_embeddings(99, mean_resizing=False)
    model = trained(larger, tmp_path / "lora", target_modules=["embed_tokens", "lm_head"])
    expected = merged(model)
    after = open_checkpoint(f"{base}+{tmp_path / 'lora'}")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after.headers[name].shape == (99, 32)
        torch.testing.assert_close(after.read(name), expected[name], rtol=1e-6, atol=1e-6)


# Refused.

UNLIKE = {
    "use_dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "peft_type": {"peft_type": "LOHA"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "trainable_token_indices": {"trainable_token_indices": [1]},
    "ensure_weight_tying": {"ensure_weight_tying": True},
}


@pytest.mark.parametrize("reason", UNLIKE)
def test_an_adapter_that_is_more_than_b_a_is_refused_with_the_reason(reason, base, tmp_path):
    trained(base, tmp_path / "lora")
    edit(tmp_path / "lora", **UNLIKE[reason])
    what = "is not a readable LoRA adapter" if reason == "peft_type" else "is no plain LoRA delta"
    with pytest.raises(AdapterError, match=rf"`{tmp_path / 'lora'}` {what}: .*{reason}"):
        open_checkpoint(f"{base}+{tmp_path / 'lora'}")


def test_pissa_s_residual_base_is_why(base, tmp_path):
    """Read as a plain delta, PEFT's own PiSSA adapter would give another model than PEFT."""
    model = trained(base, tmp_path / "lora", init_lora_weights="pissa")
    expected = merged(model)["model.layers.0.self_attn.q_proj.weight"]
    edit(tmp_path / "lora", init_lora_weights=True)
    got = open_checkpoint(f"{base}+{tmp_path / 'lora'}").read("model.layers.0.self_attn.q_proj.weight")
    assert not torch.allclose(got, expected, rtol=1e-2, atol=1e-2)


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    trained(base, tmp_path / "lora")
    other = models.save(models.llama(hidden_size=48), tmp_path / "wide")
    with pytest.raises(AdapterError, match=r"adapts `model\.layers\.0.*` as .*; in the base `.*` it is"):
        open_checkpoint(f"{other}+{tmp_path / 'lora'}")
    shallow = models.save(models.llama(num_hidden_layers=1), tmp_path / "shallow")
    with pytest.raises(AdapterError, match=r"adapts `model\.layers\.1.*`, which the base `.*` does not have"):
        open_checkpoint(f"{shallow}+{tmp_path / 'lora'}")


def test_factors_of_convolutions_are_read_where_the_class_is_known(tmp_path):
    base = models.save(architectures.ARCHITECTURES["resnet"].make(), tmp_path / "base")
    expected = merged(trained(base, tmp_path / "lora", target_modules=["convolution"], lora_alpha=3))
    before, after = open_checkpoint(base), open_checkpoint(f"{base}+{tmp_path / 'lora'}")
    changed = [name for name in expected if not torch.equal(after.read(name), before.read(name))]
    assert {len(before.headers[name].shape) for name in changed} == {4}
    for name in changed:
        torch.testing.assert_close(after.read(name), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_factors_of_a_convolution_are_refused_where_it_is_not(tmp_path):
    save_file({"conv.weight": torch.randn(4, 3, 3, 3), "proj.weight": torch.randn(4, 4)}, tmp_path / "base.safetensors")
    (tmp_path / "lora").mkdir()
    factors = {"conv.lora_A.weight": torch.randn(2, 3, 3, 3), "conv.lora_B.weight": torch.randn(4, 2, 1, 1)}
    save_file({f"base_model.model.{k}": v for k, v in factors.items()}, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2}')
    with pytest.raises(AdapterError, match="`conv`"):
        open_checkpoint(f"{tmp_path / 'base.safetensors'}+{tmp_path / 'lora'}")
