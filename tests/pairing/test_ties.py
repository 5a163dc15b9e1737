"""Weights that are one under several names, whichever of these a file has."""

import copy

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file, save_model

from peft_posthoc import export, extract, verify
from tests.make import models, pieces
from tests.make.architectures import SIZES

RANK = 128
CLOSE = 1e-4
HEAD, TOKENS = "lm_head.weight", "model.embed_tokens.weight"


def renamed(folder, to, names):
    """A copy of a model's folder in which tensors have other names."""
    models.load(folder).save_pretrained(to)
    tensors = load_file(f"{folder}/model.safetensors")
    save_file({names.get(name, name): one for name, one in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.fixture(params=["base", "tuned", "both"])
def sides(request, tied_pair, tmp_path):
    """A pair of a tied model, of which one or both have the head's name alone, as `save_model` keeps it."""
    base, tuned = tied_pair
    if request.param != "tuned":
        base = renamed(base, tmp_path / "base", {TOKENS: HEAD})
    return base, tuned if request.param == "base" else renamed(tuned, tmp_path / "tuned", {TOKENS: HEAD})


def test_save_model_keeps_the_head_s_name(tmp_path):
    save_model(models.llama(tie_word_embeddings=True), str(tmp_path / "model.safetensors"))
    assert HEAD in models.names_of(tmp_path)
    assert TOKENS not in models.names_of(tmp_path)


@pytest.mark.parametrize("options", [{"form": "peft"}, {"embeddings": True}, {"head": True}, {}], ids=str)
def test_whichever_name_a_tied_weight_is_stored_under_the_adapter_is_the_same(options, sides, tied_pair, tmp_path):
    adapter, plain = extract(*sides, RANK, **options), extract(*tied_pair, RANK, **options)
    assert adapter.factors.keys() == plain.factors.keys()
    for module, factors in plain.factors.items():
        assert all(torch.equal(x, y) for x, y in zip(adapter.factors[module], factors, strict=True))
    assert adapter.report.totals.energy_of_all == plain.report.totals.energy_of_all
    assert [one for one in adapter.report.warnings if "is tied" in one] == [
        one for one in plain.report.warnings if "is tied" in one
    ]
    out = adapter.save(tmp_path / "out")
    true = pieces.true_share(*tied_pair, pieces.merged(sides[0], out))
    assert true == pytest.approx(adapter.report.totals.energy_of_all, abs=CLOSE)
    assert verify(out, *sides, outputs=False).energy == pytest.approx(true, abs=CLOSE)


def test_merged_a_file_keeps_the_name_it_has(tied_pair, tmp_path):
    base, tuned = (renamed(folder, tmp_path / str(n), {TOKENS: HEAD}) for n, folder in enumerate(tied_pair))
    out = extract(base, tuned, RANK, form="peft").save(tmp_path / "a")
    export(out, tmp_path / "out", "merged", base=base)
    got, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tuned))
    assert got.keys() == wanted.keys()
    assert all(torch.allclose(got[name], wanted[name], atol=1e-6) for name in wanted)


def test_a_tie_that_both_files_contradict_is_none(tmp_path):
    torch.manual_seed(0)
    model = models.llama(tie_word_embeddings=False)
    base, tuned = models.save_pair(model, tmp_path)
    tied = tf.LlamaForCausalLM(tf.LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": True}))
    for folder in (base, tuned):
        tied.config.save_pretrained(folder)
    adapter = extract(base, tuned, RANK, form="peft")
    out = adapter.save(tmp_path / "out")
    got, wanted = (dict(one.named_parameters()) for one in (pieces.merged(base, out), models.load(tuned)))
    for name in (TOKENS, HEAD):
        assert torch.allclose(got[name], wanted[name], atol=1e-5)
    assert not [one for one in adapter.report.warnings if "is tied" in one]
    export(out, tmp_path / "merged", "merged", base=base)
    after, before = (load_file(f"{folder}/model.safetensors") for folder in (tmp_path / "merged", tuned))
    assert all(torch.allclose(after[name], before[name], atol=1e-5) for name in before)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A model whose encoder has the layers of its decoder."""
    return pieces.pair_of(pieces.diffusion_gemma, tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize("options", [{}, {"form": "peft"}, {"embeddings": True, "head": True}], ids=str)
def test_layers_that_two_stacks_share_are_adapted_in_both(options, shared, tmp_path):
    base, tuned = shared
    adapter = extract(base, tuned, RANK, **options)
    used = {place.module for places in adapter.plan.carried.values() for place in places}
    of_decoder = {one for one in used if one.startswith(("model.decoder.layers.", "model.decoder.embed_tokens"))}
    assert of_decoder
    assert {one.replace("model.decoder.", "model.encoder.language_model.") for one in of_decoder} <= used
    share = pieces.true_share(base, tuned, pieces.merged(base, adapter.save(tmp_path / "out")))
    assert share == pytest.approx(adapter.report.totals.energy_of_all, abs=CLOSE)


def test_shared_layers_merge_into_their_one_weight(shared, tmp_path):
    base, tuned = shared
    adapter = extract(base, tuned, RANK, form="peft")
    export(adapter.save(tmp_path / "a"), tmp_path / "out", "merged", base=base)
    share = pieces.true_share(base, tuned, models.load(tmp_path / "out"))
    assert share == pytest.approx(adapter.report.totals.energy_of_all, abs=CLOSE)


def test_merged_a_head_has_its_bias_under_the_name_that_is_stored(tmp_path):
    config = tf.BertConfig(**SIZES, tie_word_embeddings=True)
    base, tuned = models.save_pair(tf.BertForMaskedLM(config), tmp_path)
    out = extract(base, tuned, RANK, form="peft").save(tmp_path / "a")
    export(out, tmp_path / "out", "merged", base=base)
    got, wanted = (load_file(f"{folder}/model.safetensors") for folder in (tmp_path / "out", tuned))
    name = "cls.predictions.bias"
    assert torch.allclose(got[name], wanted[name], atol=1e-6)


def test_live_models_are_tied_as_their_files_are(shared):
    base, tuned = shared
    adapter = extract(models.load(base), copy.deepcopy(models.load(tuned)), 4, form="peft")
    plain = extract(base, tuned, 4, form="peft")
    assert adapter.factors.keys() == plain.factors.keys()


@pytest.mark.parametrize("twice", [(0,), (1,), (0, 1)], ids=["base", "tuned", "both"])
def test_a_tied_weight_that_is_stored_twice_is_one_weight(twice, tied_pair, tmp_path):
    sides = list(tied_pair)
    for side in twice:
        tensors = load_file(f"{sides[side]}/model.safetensors")
        sides[side] = renamed(sides[side], tmp_path / str(side), {})
        save_file(tensors | {HEAD: tensors[TOKENS].clone()}, sides[side] / "model.safetensors", {"format": "pt"})
    adapter, plain = (extract(*pair, RANK, form="peft") for pair in (sides, tied_pair))
    assert adapter.factors.keys() == plain.factors.keys()
    assert adapter.report.totals.energy_of_all == plain.report.totals.energy_of_all
    assert {row.weight for row in adapter.report.rows} == {row.weight for row in plain.report.rows}
