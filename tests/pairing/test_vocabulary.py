import copy

import pytest
import torch
import transformers
from click.testing import CliRunner

from peft_posthoc import MismatchError, extract, verify
from peft_posthoc.cli.main import main
from tests.make import models

EPS = torch.finfo(torch.float32).eps


def resized_pair(folder, rows, *, tied):
    """A Llama with 96 tokens, and a full fine-tune of it with `rows`."""
    torch.manual_seed(0)
    model = models.llama(tie_word_embeddings=tied)
    tuned = models.tuned_from(model)
    tuned.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for embedding in (tuned.get_input_embeddings(), tuned.get_output_embeddings()):
            embedding.weight[96:] = torch.randn(max(rows - 96, 0), embedding.weight.shape[1])
    models.save(model, folder / "base")
    models.save(tuned, folder / "tuned")
    return str(folder / "base"), str(folder / "tuned")


@pytest.fixture(params=[99, 90], ids=["more", "fewer"])
def rows(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pair(request, rows, tmp_path):
    return resized_pair(tmp_path, rows, tied=request.param)


def test_by_default_other_sizes_are_an_error_that_tells_both_ways_out(pair, rows, tmp_path):
    with pytest.raises(MismatchError, match=rf"96 rows in base, {rows} in tuned .*vocab='truncate'.*vocab='extend'"):
        extract(*pair, 4)
    result = CliRunner().invoke(main, ["extract", *pair, str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


def test_truncated_to_the_base_s_rows_the_adapter_fits_the_base(pair, rows, tmp_path):
    adapter = extract(*pair, 4096, vocab="truncate", embeddings=True, head=True)
    by_name = {row.weight: row for row in adapter.report.rows}
    embedding, beyond = (by_name.get(f"model.embed_tokens.weight{end}") for end in ("", "[96:]"))
    assert (embedding.status, embedding.shape) == ("extracted", (96, 32))
    said = "those beyond 96 are left out" if rows > 96 else "those beyond 90 stay the base's"
    assert any(said in note for note in adapter.report.notes)
    if rows > 96:
        assert (beyond.status, beyond.shape, beyond.reason) == ("left out", (3, 32), "only in tuned")
        assert beyond.tuned_norm > 0
    else:
        assert beyond is None
    loaded = models.load_adapter(pair[0], adapter.save(tmp_path / "out"), tied=True)
    deltas, (base, tuned) = models.lora_deltas(loaded), (models.load(folder) for folder in pair)
    common = min(96, rows)
    wanted = (tuned.get_input_embeddings().weight[:common] - base.get_input_embeddings().weight[:common]).detach()
    found = deltas["model.embed_tokens"]
    assert (found[:common] - wanted).norm() < 100 * EPS * base.get_input_embeddings().weight.norm()
    assert found[common:].norm() < 1e-4


def test_truncated_in_the_peft_form_it_is_verified(pair, tmp_path):
    adapter = extract(*pair, 4096, form="peft", vocab="truncate")
    found = verify(adapter.save(tmp_path / "out"), *pair, outputs=False)
    assert found.energy == pytest.approx(1, abs=1e-5)


# What PEFT says of tied weights; so does our report.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_extended_the_adapter_gives_the_tuned_model_on_the_resized_base(pair, rows, tmp_path):
    import peft

    base, tuned = pair
    adapter = extract(base, tuned, 4096, form="peft", vocab="extend")
    assert not [row for row in adapter.report.rows if row.status == "left out"]
    assert any(f"`model.resize_token_embeddings({rows})`" in note for note in adapter.report.notes)
    model = models.load(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    loaded = peft.PeftModel.from_pretrained(model, adapter.save(tmp_path / "out")).eval()
    ids, wanted = torch.arange(80)[None], models.load(tuned)
    with torch.no_grad():
        assert (loaded(ids).logits - wanted(ids).logits).norm() < 100 * EPS * wanted(ids).logits.norm()
    found = verify(tmp_path / "out", base, tuned, token_ids=[list(range(20))])
    assert found.energy == pytest.approx(1, abs=1e-5)
    assert found.adapter.relative_error < 1e-4 < found.base.relative_error


def test_what_was_truncated_is_verified_by_weights_alone(pair, tmp_path):
    out = extract(*pair, 4096, vocab="truncate").save(tmp_path / "out")
    found = verify(out, *pair, token_ids=[[1, 2, 3]])
    assert found.adapter is None
    assert "the vocabularies differ" in found.outputs_note
    assert 0.3 < found.energy < 0.99


def test_extending_is_for_the_form_that_can(pair):
    with pytest.raises(ValueError, match="only `form='peft'` can"):
        extract(*pair, 4, vocab="extend")
    with pytest.raises(ValueError, match="`vocab` must be one of error, truncate, extend"):
        extract(*pair, 4, vocab="pad")


def test_other_shapes_than_the_vocabulary_s_are_an_error_whatever_is_asked(tmp_path):
    base, tuned = resized_pair(tmp_path, 99, tied=False)
    other = models.load(tuned)
    weights = copy.deepcopy(other.state_dict())
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name][:40]
    with pytest.raises(MismatchError, match=rf"1 tensor has another shape .*{name}"):
        extract(base, weights, 4, vocab="truncate")


@pytest.fixture
def reward(tmp_path):
    """A language model, and a reward model made of it: its head is gone, and another one is new."""
    torch.manual_seed(0)
    base = models.llama()
    models.save(base, tmp_path / "base")
    cls = transformers.LlamaForSequenceClassification
    tuned = cls.from_pretrained(tmp_path / "base", num_labels=1, pad_token_id=0)
    models.save(models.tuned_from(tuned), tmp_path / "tuned")
    return str(tmp_path / "base"), str(tmp_path / "tuned")


@pytest.mark.filterwarnings("ignore:.*score")
def test_a_reward_model_s_head_comes_whole(reward, tmp_path):
    import peft

    base, tuned = reward
    adapter = extract(base, tuned, 4096, form="peft")
    status = {row.weight: (row.status, row.reason) for row in adapter.report.rows}
    assert status["score.weight"] == ("whole", "")
    assert status["lm_head.weight"] == ("left out", "only in base")
    config = adapter.file.config(adapter.provenance)
    assert (config["task_type"], "score" in config["modules_to_save"]) == (None, True)
    cls = transformers.LlamaForSequenceClassification
    model = cls.from_pretrained(base, num_labels=1, pad_token_id=0)
    loaded = peft.PeftModel.from_pretrained(model, adapter.save(tmp_path / "out")).eval()
    wanted, ids = models.load(tuned), torch.arange(1, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, wanted(ids).logits, rtol=1e-4, atol=1e-5)
    assert verify(tmp_path / "out", base, tuned, outputs=False).energy == pytest.approx(1, abs=1e-5)


def test_the_portable_form_leaves_a_new_head_out_and_says_so(reward):
    report = extract(*reward, 4).report
    assert {row.weight: row.reason for row in report.rows}["score.weight"] == "only in tuned"
    assert any("1 tensor is only in tuned" in warning for warning in report.warnings)
