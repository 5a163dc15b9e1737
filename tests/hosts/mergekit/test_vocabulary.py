"""Merges whose vocabulary is not the base's."""

import json

import pytest
import torch

from tests.make import mergekit_runs, models
from tests.make.mergekit_runs import refused, same, with_tokenizers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("how", [{"source": "union"}, {"source": "base", "pad_to_multiple_of": 64}], ids=str)
def test_a_vocabulary_that_the_merge_changes_is_left_out_and_the_layers_are_not(how, tmp_path):
    pair = with_tokenizers(tmp_path, 96, 100)
    config = mergekit_runs.config(*pair, parameters={"rank": 8, "embeddings": True, "head": True}, tokenizer=how)
    got = mergekit_runs.merged_by(config, tmp_path / "out")
    if how["source"] == "base":  # mergekit puts the words of a union into another order every time
        same(got, mergekit_runs.stock(config, tmp_path / "stock"))
    assert got["lm_head.weight"].shape[0] > 96
    report = json.loads((tmp_path / "out/phlora/phlora_report.json").read_text())
    rows = {row["weight"]: row for row in report["rows"]}
    assert sum(row["status"] == "extracted" for row in rows.values()) == 14
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert rows[name]["reason"] == "the merge changes the vocabulary"


def test_a_vocabulary_in_another_order_is_left_out_too(tmp_path):
    pair = with_tokenizers(tmp_path, 96, 96, turned=True)
    config = mergekit_runs.config(
        *pair, parameters={"rank": 8, "embeddings": True, "head": True}, tokenizer={"source": {"model": pair[1]}}
    )
    got = mergekit_runs.merged_by(config, tmp_path / "out")
    same(got, mergekit_runs.stock(config, tmp_path / "stock"))
    base = mergekit_runs.tensors(pair[0])
    # Its words in the order of the fine-tune's, whose first is the base's last.
    step = got["lm_head.weight"] - base["lm_head.weight"].flip(0)
    assert torch.linalg.matrix_rank(step, rtol=1e-4) == 8
    report = json.loads((tmp_path / "out/phlora/phlora_report.json").read_text())
    reasons = {row["weight"]: row["reason"] for row in report["rows"]}
    assert reasons["lm_head.weight"] == "the merge changes the vocabulary"


VOCABULARY = ["lm_head.weight", "model.embed_tokens.weight"]


@pytest.mark.parametrize("flags", [[], ["--no-model"]], ids=["stored", "streamed"])
def test_truncated_to_the_base_s_rows_the_adapter_of_a_merge_fits_the_base(flags, longer, tmp_path):
    base, config = longer
    asked = ["--vocab", "truncate", "--embeddings", "--head", "--rank", "4096", "--dtype", "float32"]
    result = mergekit_runs.phlora(config, tmp_path / "out", *asked, *flags)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" if flags else tmp_path / "out/phlora"
    rows = {row["weight"]: row for row in json.loads((folder / "phlora_report.json").read_text())["rows"]}
    before, after = mergekit_runs.tensors(base), mergekit_runs.stock(config, tmp_path / "stock")
    deltas = models.lora_deltas(models.load_adapter(base, folder))
    for name in VOCABULARY:
        assert rows[name]["status"] == "extracted"
        assert (rows[f"{name}[96:]"]["status"], rows[f"{name}[96:]"]["shape"]) == ("left out", [4, 32])
        wanted = after[name][:96] - before[name]
        torch.testing.assert_close(deltas[name.removesuffix(".weight")], wanted, rtol=1e-4, atol=1e-6)


def test_rows_that_are_other_tokens_are_left_out_whatever_is_asked(tmp_path):
    pair = with_tokenizers(tmp_path, 96, 96, turned=True)
    parts = {"each": {"weight": 0.5}, "tokenizer": {"source": {"model": pair[1]}}}
    config = mergekit_runs.config(*pair, method="task_arithmetic", **parts)
    for vocab in ("error", "truncate"):
        flags = ["--no-model", "--vocab", vocab, "--embeddings", "--head", "--rank", "8"]
        assert mergekit_runs.phlora(config, tmp_path / vocab, *flags).exit_code == 0
        report = json.loads((tmp_path / vocab / "phlora_report.json").read_text())
        reasons = {row["weight"]: row["reason"] for row in report["rows"]}
        assert {reasons[name] for name in VOCABULARY} == {"the merge changes the vocabulary"}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_extended_the_adapter_gives_the_merge_on_the_resized_base(longer, tmp_path):
    import peft

    base, config = longer
    flags = ["--vocab", "extend", "--form", "peft", "--rank", "4096", "--dtype", "float32"]
    result = mergekit_runs.phlora(config, tmp_path / "out", *flags)
    assert result.exit_code == 0, result.output
    model, wanted, ids = models.load(base), models.load(tmp_path / "out"), torch.arange(100)[None]
    model.resize_token_embeddings(100, mean_resizing=False)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out/phlora").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, wanted(ids).logits, rtol=1e-4, atol=1e-5)


def test_other_vocabularies_stop_the_merge_where_that_is_asked_for(longer, tmp_path):
    _, config = longer
    result = mergekit_runs.phlora(config, tmp_path / "out", "--vocab", "error")
    assert (result.exit_code, "96 rows in base, 100 in tuned" in result.output) == (1, True)
    asked = ["--vocab", "extend", "--form", "peft", "--no-model"]
    refused(mergekit_runs.phlora(config, tmp_path / "out", *asked), "which `--no-model` does not write")
    result = mergekit_runs.phlora(config, tmp_path / "out", "--vocab", "extend")
    assert (result.exit_code, "only `--form peft` can" in result.output) == (1, True)
    assert not (tmp_path / "out").exists()
