"""The model that mergekit's commands write with `merge_method: phlora`."""

import contextlib
import json
import shutil
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace

import pytest
import torch

import peft_posthoc
from mergekit_plugin.method import PHLORA
from tests.make import mergekit_runs, models
from tests.make.mergekit_runs import adapters_are_the_same, same, with_tokenizers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


ARCHITECTURES = [models.llama, models.qwen2, models.gemma2, models.mixtral, models.qwen3_moe]


# The merged model.


@pytest.mark.parametrize("make", ARCHITECTURES, ids=lambda make: make.__name__)
def test_the_merged_weights_are_base_plus_b_a_of_extract_bit_for_bit(make, tmp_path):
    pair = models.save_pair(make(), tmp_path)
    config = mergekit_runs.config(*pair, parameters={"rank": 8})
    changed = peft_posthoc.extract(*pair, 8)
    changed.save(tmp_path / "adapter")
    assert len(changed.layers) >= 8
    wanted = models.load(pair[0])
    with torch.no_grad():
        for name, layer in changed.layers.items():
            wanted.get_parameter(name).add_(layer.factors.b @ layer.factors.a)
    for run in (mergekit_runs.stock, mergekit_runs.merged_by):
        run(config, tmp_path / run.__name__)
        # As transformers reads it: mergekit stacks the experts of a mixture.
        same(models.load(tmp_path / run.__name__).state_dict(), wanted.state_dict())
    adapters_are_the_same(tmp_path / "merged_by/phlora", tmp_path / "adapter")


@pytest.mark.parametrize("make", [models.mixtral, models.qwen3_moe], ids=lambda make: make.__name__)
def test_experts_that_mergekit_stacks_are_counted_with_their_change(make, tmp_path):
    pair = models.save_pair(make(), tmp_path)
    mergekit_runs.merged_by(mergekit_runs.config(*pair, parameters={"rank": 8}), tmp_path / "out")
    report = json.loads((tmp_path / "out/phlora/phlora_report.json").read_text())
    experts = {row["weight"]: row for row in report["rows"] if "experts" in row["weight"]}
    true = models.true_deltas(*pair)
    assert len(experts) == 4
    for name, row in experts.items():
        assert row["status"] == "left out"
        assert row["delta_norm"] == pytest.approx(float(true[name].norm()), rel=1e-5)


def test_gpt2_is_merged_in_its_own_orientation(tmp_path):
    pair = models.save_pair(models.gpt2(), tmp_path)
    same(
        mergekit_runs.stock(mergekit_runs.config(*pair, parameters={"rank": 8}), tmp_path / "out"),
        mergekit_runs.expected(*pair, 8),
    )


def test_rest_tuned_takes_what_is_not_factored_from_the_fine_tune(llama_pair, tmp_path):
    got = mergekit_runs.stock(
        mergekit_runs.config(*llama_pair, parameters={"rank": 8, "rest": "tuned"}), tmp_path / "out"
    )
    adapter, tuned = peft_posthoc.extract(*llama_pair, 8), mergekit_runs.tensors(llama_pair[1])
    assert all(torch.equal(got[name], tuned[name]) for name in adapter.skipped)
    assert not any(torch.equal(got[name], tuned[name]) for name in adapter.layers)


def test_an_energy_share_embeddings_and_head_mean_what_they_mean_elsewhere(llama_pair, tmp_path):
    config = mergekit_runs.config(*llama_pair, parameters={"energy": 0.8, "embeddings": True, "head": True})
    wanted = mergekit_runs.expected(*llama_pair, 0.8, embeddings=True, head=True)
    same(mergekit_runs.stock(config, tmp_path / "stock"), wanted)
    assert mergekit_runs.phlora(config, tmp_path / "alone", "--no-model").exit_code == 0
    peft_posthoc.extract(*llama_pair, 0.8, embeddings=True, head=True).save(tmp_path / "adapter")
    adapters_are_the_same(tmp_path / "alone", tmp_path / "adapter")


def test_filters_and_gradients_give_each_weight_its_own_rank(llama_pair, tmp_path):
    rank = [{"filter": "k_proj", "value": 0}, {"filter": "mlp", "value": [4, 16]}, {"value": 6}]
    config = mergekit_runs.config(*llama_pair, each={"rank": rank})

    def wanted_rank(name):
        if "mlp" in name:
            return 4 if "layers.0" in name else 16
        return 0 if "k_proj" in name else 6

    carried = peft_posthoc.extract(*llama_pair, 32).layers
    by_hand = {name: wanted_rank(name) for name in carried if wanted_rank(name)}
    wanted = mergekit_runs.tensors(llama_pair[0])
    for name, rank in by_hand.items():
        wanted[name] = mergekit_runs.expected(*llama_pair, rank)[name]
    same(mergekit_runs.stock(config, tmp_path / "stock"), wanted)
    same(mergekit_runs.merged_by(config, tmp_path / "ours"), wanted)
    peft_posthoc.extract(*llama_pair, by_hand).save(tmp_path / "adapter")
    adapters_are_the_same(tmp_path / "ours/phlora", tmp_path / "adapter")
    report = json.loads((tmp_path / "ours/phlora/phlora_report.json").read_text())
    assert {row["reason"] for row in report["rows"] if "k_proj" in row["weight"]} == {"rank 0 (parameters)"}


@pytest.mark.parametrize(
    "flags",
    [
        ["--async-write", "--write-threads", "2"],
        ["--low-cpu-memory"],
        ["--clone-tensors", "--no-copy-tokenizer"],
        ["--out-shard-size", "2K"],
    ],
    ids=lambda flags: flags[0],
)
def test_options_of_mergekit_change_no_bit(flags, llama_pair, tmp_path):
    config = mergekit_runs.config(*llama_pair, parameters={"rank": 8})
    same(mergekit_runs.merged_by(config, tmp_path / "out", *flags), mergekit_runs.expected(*llama_pair, 8))


def test_the_number_of_threads_changes_no_bit(llama_pair, tmp_path):
    config, threads = mergekit_runs.config(*llama_pair, parameters={"rank": 8}), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        got = mergekit_runs.stock(config, tmp_path / "out")
        torch.set_num_threads(1)
        same(got, mergekit_runs.expected(*llama_pair, 8))
    finally:
        torch.set_num_threads(threads)


def test_two_devices_in_two_threads_give_the_same(llama_pair, tmp_path, monkeypatch, caplog):
    from mergekit import multigpu_executor

    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_type", lambda: "cpu")
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_count", lambda: 2)
    idle = SimpleNamespace(synchronize=lambda device: None)
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_module", lambda kind: idle)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    config = mergekit_runs.config(*llama_pair, parameters={"rank": 8})
    threads = set()
    merge_group = PHLORA.merge_group
    monkeypatch.setattr(
        PHLORA, "merge_group", lambda *group, **how: (threads.add(get_ident()), merge_group(*group, **how))[1]
    )
    same(mergekit_runs.stock(config, tmp_path / "stock", "--multi-gpu"), mergekit_runs.expected(*llama_pair, 8))
    assert len(threads) == 2
    same(mergekit_runs.merged_by(config, tmp_path / "ours", "--multi-gpu"), mergekit_runs.expected(*llama_pair, 8))
    assert mergekit_runs.phlora(config, tmp_path / "alone", "--no-model", "--multi-gpu").exit_code == 0
    assert any("--multi-gpu is not used" in message for message in caplog.messages)


def test_pickled_checkpoints_are_merged_too(llama_pair, tmp_path):
    for folder in llama_pair:
        target = tmp_path / Path(folder).name
        shutil.copytree(folder, target)
        torch.save(mergekit_runs.tensors(folder), target / "pytorch_model.bin")
        (target / "model.safetensors").unlink()
    config = mergekit_runs.config(tmp_path / "base", tmp_path / "tuned", parameters={"rank": 8})
    same(mergekit_runs.merged_by(config, tmp_path / "out", "--lazy-unpickle"), mergekit_runs.expected(*llama_pair, 8))


@pytest.mark.parametrize(
    ("base", "tuned", "asked", "saved"),
    [
        (torch.bfloat16, torch.bfloat16, {}, torch.bfloat16),
        (torch.bfloat16, torch.float32, {}, torch.bfloat16),
        (torch.float32, torch.bfloat16, {}, torch.float32),
        (torch.float16, torch.bfloat16, {}, torch.float16),
        (torch.bfloat16, torch.bfloat16, {"dtype": "float32"}, torch.float32),
        (torch.bfloat16, torch.float32, {"dtype": "float32", "out_dtype": "bfloat16"}, torch.bfloat16),
    ],
    ids=str,
)
def test_the_files_are_of_the_type_that_their_config_says(base, tuned, asked, saved, tmp_path):
    model = models.llama()
    models.save(models.llama().to(base), tmp_path / "base")
    models.save(models.tuned_from(model).to(tuned), tmp_path / "tuned")
    pair = (tmp_path / "base", tmp_path / "tuned")
    got = mergekit_runs.merged_by(mergekit_runs.config(*pair, parameters={"rank": 8}, **asked), tmp_path / "out")
    assert {tensor.dtype for tensor in got.values()} == {saved}
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["dtype"] == str(saved).removeprefix("torch.")
    # Whatever the types, the arithmetic is that of float32.
    factors = peft_posthoc.extract(*pair, 8).layers
    weights = mergekit_runs.tensors(pair[0])
    for name, layer in factors.items():
        wanted = weights[name].float() + layer.factors.b @ layer.factors.a
        assert torch.equal(got[name], wanted.to(saved)), name


def test_a_tied_base_and_an_untied_fine_tune(tmp_path):
    base = models.llama(tie_word_embeddings=True)
    tuned = models.llama()
    tuned.load_state_dict(models.tuned_from(base).state_dict())
    torch.nn.init.normal_(tuned.lm_head.weight)
    pair = models.save(base, tmp_path / "base"), models.save(tuned, tmp_path / "tuned")
    mergekit_runs.merged_by(mergekit_runs.config(*pair, parameters={"rank": 8}), tmp_path / "out")
    # The head is left out, and the model says what base + adapter says: the tied head.
    model, adapted = models.load(tmp_path / "out"), models.load_adapter(str(pair[0]), tmp_path / "out/phlora")
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    report = json.loads((tmp_path / "out/phlora/phlora_report.json").read_text())
    (head,) = (row for row in report["rows"] if row["weight"] == "lm_head.weight")
    assert head["status"] == "left out"


@pytest.mark.parametrize("rest", ["base", "tuned"])
def test_a_head_that_only_the_fine_tune_has_is_never_factored(rest, tmp_path):
    base, tuned = models.llama(tie_word_embeddings=True), models.llama()
    tuned.load_state_dict(models.tuned_from(base).state_dict())
    torch.nn.init.normal_(tuned.lm_head.weight)
    pair = models.save(base, tmp_path / "base"), models.save(tuned, tmp_path / "tuned")
    config = mergekit_runs.config(*pair, parameters={"rank": 8, "head": True, "rest": rest})
    stock, ours = mergekit_runs.stock(config, tmp_path / "stock"), mergekit_runs.merged_by(config, tmp_path / "ours")
    same(stock, ours)
    source = mergekit_runs.tensors(pair[0])["model.embed_tokens.weight"] if rest == "base" else tuned.lm_head.weight
    assert torch.equal(ours["lm_head.weight"], source)


def test_a_longer_vocabulary_is_aligned_by_mergekit(tmp_path):
    pair = with_tokenizers(tmp_path, 96, 100)
    config = mergekit_runs.config(*pair, parameters={"rank": 8}, tokenizer={"source": "base"})
    got = mergekit_runs.merged_by(config, tmp_path / "out")
    assert got["lm_head.weight"].shape == (96, 32)
    report = json.loads((tmp_path / "out/phlora/phlora_report.json").read_text())
    assert sum(row["status"] == "extracted" for row in report["rows"]) == 14
    weights = mergekit_runs.tensors(pair[0])
    factors = peft_posthoc.extract(*pair, 8, exclude="embed_tokens|lm_head").layers
    assert all(torch.equal(got[n], weights[n] + one.factors.b @ one.factors.a) for n, one in factors.items())
