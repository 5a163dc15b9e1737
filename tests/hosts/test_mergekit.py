"""mergekit's commands with `merge_method: phlora`, and adapters out of merges of any kind."""

import contextlib
import json
import shutil
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import peft_posthoc
from mergekit_plugin import command, register
from mergekit_plugin.method import PHLORA
from peft_posthoc import above_noise, extract, keep_energy, keep_error, limited
from tests.make import merges, models, multimodal

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ARCHITECTURES = [models.llama, models.qwen2, models.gemma2, models.mixtral, models.qwen3_moe]
EXAMPLES = Path(__file__).parents[2] / "examples/mergekit"


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


def adapters_are_the_same(one, other):
    same(merges.tensors(one), merges.tensors(other))
    configs = [json.loads((Path(folder) / "adapter_config.json").read_text()) for folder in (one, other)]
    assert configs[0] == configs[1]


# The merged model.


@pytest.mark.parametrize("make", ARCHITECTURES, ids=lambda make: make.__name__)
def test_the_merged_weights_are_base_plus_b_a_of_extract_bit_for_bit(make, tmp_path):
    pair = models.save_pair(make(), tmp_path)
    config = merges.config(*pair, parameters={"rank": 8})
    changed = peft_posthoc.extract(*pair, 8)
    changed.save(tmp_path / "adapter")
    assert len(changed.layers) >= 8
    wanted = models.load(pair[0])
    with torch.no_grad():
        for name, layer in changed.layers.items():
            wanted.get_parameter(name).add_(layer.factors.b @ layer.factors.a)
    for run in (merges.stock, merges.merged_by):
        run(config, tmp_path / run.__name__)
        # As transformers reads it: mergekit stacks the experts of a mixture.
        same(models.load(tmp_path / run.__name__).state_dict(), wanted.state_dict())
    adapters_are_the_same(tmp_path / "merged_by/phlora", tmp_path / "adapter")


@pytest.mark.parametrize("make", [models.mixtral, models.qwen3_moe], ids=lambda make: make.__name__)
def test_experts_that_mergekit_stacks_are_counted_with_their_change(make, tmp_path):
    pair = models.save_pair(make(), tmp_path)
    merges.merged_by(merges.config(*pair, parameters={"rank": 8}), tmp_path / "out")
    report = json.loads((tmp_path / "out/phlora/phlora_report.json").read_text())
    experts = {row["weight"]: row for row in report["rows"] if "experts" in row["weight"]}
    true = models.true_deltas(*pair)
    assert len(experts) == 4
    for name, row in experts.items():
        assert row["status"] == "left out"
        assert row["delta_norm"] == pytest.approx(float(true[name].norm()), rel=1e-5)


def test_gpt2_is_merged_in_its_own_orientation(tmp_path):
    pair = models.save_pair(models.gpt2(), tmp_path)
    same(merges.stock(merges.config(*pair, parameters={"rank": 8}), tmp_path / "out"), merges.expected(*pair, 8))


def test_rest_tuned_takes_what_is_not_factored_from_the_fine_tune(llama_pair, tmp_path):
    got = merges.stock(merges.config(*llama_pair, parameters={"rank": 8, "rest": "tuned"}), tmp_path / "out")
    adapter, tuned = peft_posthoc.extract(*llama_pair, 8), merges.tensors(llama_pair[1])
    assert all(torch.equal(got[name], tuned[name]) for name in adapter.skipped)
    assert not any(torch.equal(got[name], tuned[name]) for name in adapter.layers)


def test_an_energy_share_embeddings_and_head_mean_what_they_mean_elsewhere(llama_pair, tmp_path):
    config = merges.config(*llama_pair, parameters={"energy": 0.8, "embeddings": True, "head": True})
    wanted = merges.expected(*llama_pair, 0.8, embeddings=True, head=True)
    same(merges.stock(config, tmp_path / "stock"), wanted)
    assert merges.phlora(config, tmp_path / "alone", "--no-model").exit_code == 0
    peft_posthoc.extract(*llama_pair, 0.8, embeddings=True, head=True).save(tmp_path / "adapter")
    adapters_are_the_same(tmp_path / "alone", tmp_path / "adapter")


def test_filters_and_gradients_give_each_weight_its_own_rank(llama_pair, tmp_path):
    rank = [{"filter": "k_proj", "value": 0}, {"filter": "mlp", "value": [4, 16]}, {"value": 6}]
    config = merges.config(*llama_pair, each={"rank": rank})

    def wanted_rank(name):
        if "mlp" in name:
            return 4 if "layers.0" in name else 16
        return 0 if "k_proj" in name else 6

    carried = peft_posthoc.extract(*llama_pair, 32).layers
    by_hand = {name: wanted_rank(name) for name in carried if wanted_rank(name)}
    wanted = merges.tensors(llama_pair[0])
    for name, rank in by_hand.items():
        wanted[name] = merges.expected(*llama_pair, rank)[name]
    same(merges.stock(config, tmp_path / "stock"), wanted)
    same(merges.merged_by(config, tmp_path / "ours"), wanted)
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
    config = merges.config(*llama_pair, parameters={"rank": 8})
    same(merges.merged_by(config, tmp_path / "out", *flags), merges.expected(*llama_pair, 8))


def test_the_number_of_threads_changes_no_bit(llama_pair, tmp_path):
    config, threads = merges.config(*llama_pair, parameters={"rank": 8}), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        got = merges.stock(config, tmp_path / "out")
        torch.set_num_threads(1)
        same(got, merges.expected(*llama_pair, 8))
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
    config = merges.config(*llama_pair, parameters={"rank": 8})
    threads = set()
    merge_group = PHLORA.merge_group
    monkeypatch.setattr(
        PHLORA, "merge_group", lambda *group, **how: (threads.add(get_ident()), merge_group(*group, **how))[1]
    )
    same(merges.stock(config, tmp_path / "stock", "--multi-gpu"), merges.expected(*llama_pair, 8))
    assert len(threads) == 2
    same(merges.merged_by(config, tmp_path / "ours", "--multi-gpu"), merges.expected(*llama_pair, 8))
    assert merges.phlora(config, tmp_path / "alone", "--no-model", "--multi-gpu").exit_code == 0
    assert any("--multi-gpu is not used" in message for message in caplog.messages)


def test_pickled_checkpoints_are_merged_too(llama_pair, tmp_path):
    for folder in llama_pair:
        target = tmp_path / Path(folder).name
        shutil.copytree(folder, target)
        torch.save(merges.tensors(folder), target / "pytorch_model.bin")
        (target / "model.safetensors").unlink()
    config = merges.config(tmp_path / "base", tmp_path / "tuned", parameters={"rank": 8})
    same(merges.merged_by(config, tmp_path / "out", "--lazy-unpickle"), merges.expected(*llama_pair, 8))


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
    got = merges.merged_by(merges.config(*pair, parameters={"rank": 8}, **asked), tmp_path / "out")
    assert {tensor.dtype for tensor in got.values()} == {saved}
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["dtype"] == str(saved).removeprefix("torch.")
    # Whatever the types, the arithmetic is that of float32.
    factors = peft_posthoc.extract(*pair, 8).layers
    weights = merges.tensors(pair[0])
    for name, layer in factors.items():
        wanted = weights[name].float() + layer.factors.b @ layer.factors.a
        assert torch.equal(got[name], wanted.to(saved)), name


def test_a_tied_base_and_an_untied_fine_tune(tmp_path):
    base = models.llama(tie_word_embeddings=True)
    tuned = models.llama()
    tuned.load_state_dict(models.tuned_from(base).state_dict())
    torch.nn.init.normal_(tuned.lm_head.weight)
    pair = models.save(base, tmp_path / "base"), models.save(tuned, tmp_path / "tuned")
    merges.merged_by(merges.config(*pair, parameters={"rank": 8}), tmp_path / "out")
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
    config = merges.config(*pair, parameters={"rank": 8, "head": True, "rest": rest})
    stock, ours = merges.stock(config, tmp_path / "stock"), merges.merged_by(config, tmp_path / "ours")
    same(stock, ours)
    source = merges.tensors(pair[0])["model.embed_tokens.weight"] if rest == "base" else tuned.lm_head.weight
    assert torch.equal(ours["lm_head.weight"], source)


def test_a_longer_vocabulary_is_aligned_by_mergekit(tmp_path):
    pair = with_tokenizers(tmp_path, 96, 100)
    config = merges.config(*pair, parameters={"rank": 8}, tokenizer={"source": "base"})
    got = merges.merged_by(config, tmp_path / "out")
    assert got["lm_head.weight"].shape == (96, 32)
    report = json.loads((tmp_path / "out/phlora/phlora_report.json").read_text())
    assert sum(row["status"] == "extracted" for row in report["rows"]) == 14
    weights = merges.tensors(pair[0])
    factors = peft_posthoc.extract(*pair, 8, exclude="embed_tokens|lm_head").layers
    assert all(torch.equal(got[n], weights[n] + one.factors.b @ one.factors.a) for n, one in factors.items())


def test_slices_of_the_models_as_they_are(llama_pair, tmp_path):
    config = merges.config(llama_pair[0], parameters={"rank": 8}, slices=slices(llama_pair, (0, 1), (1, 2)))
    same(merges.merged_by(config, tmp_path / "out"), merges.expected(*llama_pair, 8))


def test_slices_that_renumber_layers_merge_but_have_no_adapter(llama_pair, tmp_path):
    config = merges.config(llama_pair[0], parameters={"rank": 8}, slices=slices(llama_pair, (0, 2), (1, 2)))
    got = merges.stock(config, tmp_path / "stock")
    second = {name: tensor for name, tensor in got.items() if "layers.2" in name}
    base, tuned = (merges.tensors(folder) for folder in llama_pair)
    for name in (name for name in second if "proj" in name):
        stored = name.replace("layers.2", "layers.1")
        delta, step = tuned[stored] - base[stored], second[name] - base[stored]
        assert torch.linalg.matrix_rank(step, rtol=1e-4) == 8
        tail = torch.linalg.svdvals(delta.double())[8:].norm()
        torch.testing.assert_close((delta - step).double().norm(), tail, rtol=1e-4, atol=0)
    result = merges.phlora(config, tmp_path / "out")
    assert result.exit_code == 1
    assert "layer 2 of the result is layer 1 of" in result.output
    assert not (tmp_path / "out").exists()


def test_slices_of_fewer_layers_have_no_adapter(llama_pair, tmp_path):
    config = merges.config(llama_pair[0], parameters={"rank": 8}, slices=slices(llama_pair, (0, 1)))
    refused(merges.phlora(config, tmp_path / "out"), "The result has 1 layers", "has 2")


def test_slices_of_two_bases_have_no_adapter(three, tmp_path):
    one, two = slices((str(three / "base"), str(three / "tuned")), (0, 1), (1, 2))
    other = {"sources": [two["sources"][1], {**two["sources"][0], "model": str(three / "tuned-too")}]}
    other["base_model"] = str(three / "tuned-too")
    config = merges.config(three / "base", parameters={"rank": 8}, slices=[one, other])
    refused(merges.phlora(config, tmp_path / "out"), "is made from the base", "tuned-too")


def test_a_base_that_only_the_slices_name_is_found(llama_pair, tmp_path):
    parts = [{**piece, "base_model": llama_pair[0]} for piece in slices(llama_pair, (0, 1), (1, 2))]
    config = merges.config(None, parameters={"rank": 8}, slices=parts, base_model=llama_pair[0])
    wanted = merges.expected(*llama_pair, 8)
    same(merges.merged_by(config, tmp_path / "both"), wanted)
    same(merges.merged_by({**config, "base_model": None}, tmp_path / "out"), wanted)


def slices(pair, *ranges):
    return [{"sources": [{"model": folder, "layer_range": list(one)} for folder in pair]} for one in ranges]


@pytest.mark.parametrize("how", [{"source": "union"}, {"source": "base", "pad_to_multiple_of": 64}], ids=str)
def test_a_vocabulary_that_the_merge_changes_is_left_out_and_the_layers_are_not(how, tmp_path):
    pair = with_tokenizers(tmp_path, 96, 100)
    config = merges.config(*pair, parameters={"rank": 8, "embeddings": True, "head": True}, tokenizer=how)
    got = merges.merged_by(config, tmp_path / "out")
    if how["source"] == "base":  # mergekit puts the words of a union into another order every time
        same(got, merges.stock(config, tmp_path / "stock"))
    assert got["lm_head.weight"].shape[0] > 96
    report = json.loads((tmp_path / "out/phlora/phlora_report.json").read_text())
    rows = {row["weight"]: row for row in report["rows"]}
    assert sum(row["status"] == "extracted" for row in rows.values()) == 14
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert rows[name]["reason"] == "the merge changes the vocabulary"


def test_a_vocabulary_in_another_order_is_left_out_too(tmp_path):
    pair = with_tokenizers(tmp_path, 96, 96, turned=True)
    config = merges.config(
        *pair, parameters={"rank": 8, "embeddings": True, "head": True}, tokenizer={"source": {"model": pair[1]}}
    )
    got = merges.merged_by(config, tmp_path / "out")
    same(got, merges.stock(config, tmp_path / "stock"))
    base = merges.tensors(pair[0])
    # Its words in the order of the fine-tune's, whose first is the base's last.
    step = got["lm_head.weight"] - base["lm_head.weight"].flip(0)
    assert torch.linalg.matrix_rank(step, rtol=1e-4) == 8
    report = json.loads((tmp_path / "out/phlora/phlora_report.json").read_text())
    reasons = {row["weight"]: row["reason"] for row in report["rows"]}
    assert reasons["lm_head.weight"] == "the merge changes the vocabulary"


@pytest.fixture
def longer(tmp_path):
    """A base, a fine-tune with more tokens, and the configuration that merges them over the tokens of both."""
    pair = with_tokenizers(tmp_path, 96, 100)
    union = {"tokenizer": {"source": "union"}}
    return pair[0], merges.config(*pair, method="task_arithmetic", each={"weight": 0.5}, **union)


VOCABULARY = ["lm_head.weight", "model.embed_tokens.weight"]


@pytest.mark.parametrize("flags", [[], ["--no-model"]], ids=["stored", "streamed"])
def test_truncated_to_the_base_s_rows_the_adapter_of_a_merge_fits_the_base(flags, longer, tmp_path):
    base, config = longer
    asked = ["--vocab", "truncate", "--embeddings", "--head", "--rank", "4096", "--dtype", "float32"]
    result = merges.phlora(config, tmp_path / "out", *asked, *flags)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" if flags else tmp_path / "out/phlora"
    rows = {row["weight"]: row for row in json.loads((folder / "phlora_report.json").read_text())["rows"]}
    before, after = merges.tensors(base), merges.stock(config, tmp_path / "stock")
    deltas = models.lora_deltas(models.load_adapter(base, folder))
    for name in VOCABULARY:
        assert rows[name]["status"] == "extracted"
        assert (rows[f"{name}[96:]"]["status"], rows[f"{name}[96:]"]["shape"]) == ("left out", [4, 32])
        wanted = after[name][:96] - before[name]
        torch.testing.assert_close(deltas[name.removesuffix(".weight")], wanted, rtol=1e-4, atol=1e-6)


def test_rows_that_are_other_tokens_are_left_out_whatever_is_asked(tmp_path):
    pair = with_tokenizers(tmp_path, 96, 96, turned=True)
    parts = {"each": {"weight": 0.5}, "tokenizer": {"source": {"model": pair[1]}}}
    config = merges.config(*pair, method="task_arithmetic", **parts)
    for vocab in ("error", "truncate"):
        flags = ["--no-model", "--vocab", vocab, "--embeddings", "--head", "--rank", "8"]
        assert merges.phlora(config, tmp_path / vocab, *flags).exit_code == 0
        report = json.loads((tmp_path / vocab / "phlora_report.json").read_text())
        reasons = {row["weight"]: row["reason"] for row in report["rows"]}
        assert {reasons[name] for name in VOCABULARY} == {"the merge changes the vocabulary"}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_extended_the_adapter_gives_the_merge_on_the_resized_base(longer, tmp_path):
    import peft

    base, config = longer
    flags = ["--vocab", "extend", "--form", "peft", "--rank", "4096", "--dtype", "float32"]
    result = merges.phlora(config, tmp_path / "out", *flags)
    assert result.exit_code == 0, result.output
    model, wanted, ids = models.load(base), models.load(tmp_path / "out"), torch.arange(100)[None]
    model.resize_token_embeddings(100, mean_resizing=False)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out/phlora").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, wanted(ids).logits, rtol=1e-4, atol=1e-5)


def test_other_vocabularies_stop_the_merge_where_that_is_asked_for(longer, tmp_path):
    _, config = longer
    result = merges.phlora(config, tmp_path / "out", "--vocab", "error")
    assert (result.exit_code, "96 rows in base, 100 in tuned" in result.output) == (1, True)
    asked = ["--vocab", "extend", "--form", "peft", "--no-model"]
    refused(merges.phlora(config, tmp_path / "out", *asked), "which `--no-model` does not write")
    result = merges.phlora(config, tmp_path / "out", "--vocab", "extend")
    assert (result.exit_code, "only `--form peft` can" in result.output) == (1, True)
    assert not (tmp_path / "out").exists()


def with_tokenizers(folder, *sizes, turned=False):
    """A base and a fine-tune of it, of vocabularies that begin alike; or of which the second is the first, turned."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = models.llama(vocab_size=max(sizes))
    for name, one, size in zip(("base", "tuned"), (model, models.tuned_from(model)), sizes, strict=True):
        one.resize_token_embeddings(size)
        models.save(one, folder / name)
        order = reversed(range(size)) if turned and name == "tuned" else range(size)
        words = Tokenizer(WordLevel({f"w{i}": at for at, i in enumerate(order)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder / name)
    return str(folder / "base"), str(folder / "tuned")


# The adapter of any merge.


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A base and two fine-tunes of it."""
    torch.manual_seed(0)
    folder, base = tmp_path_factory.mktemp("three"), models.llama()
    for name, model in (("base", base), ("tuned", models.tuned_from(base)), ("tuned-too", models.tuned_from(base))):
        models.save(model, folder / name)
    return folder


METHODS = {
    "ties": {"each": {"weight": 0.5, "density": 0.6}},
    "dare_ties": {"each": {"weight": 0.5, "density": 0.6}},
    "task_arithmetic": {"each": {"weight": 0.7}},
    "linear": {"each": {"weight": 0.5}},
    "model_stock": {},
    "phlora": {"parameters": {"rank": 8}},
}


@pytest.mark.parametrize("method", METHODS)
def test_without_a_model_the_adapter_is_that_of_the_stored_merge(method, three, tmp_path):
    tuned = [three / "tuned"] if method == "phlora" else [three / "tuned", three / "tuned-too"]
    base = three / "base"
    config = merges.config(None if method == "linear" else base, *tuned, method=method, **METHODS[method])
    flags = ["--random-seed", "7"] + (["--base", str(base)] if method == "linear" else [])
    ours = [] if method == "phlora" else ["--rank", "8"]
    stored = merges.stock(config, tmp_path / "stored", *flags[:2])
    assert merges.phlora(config, tmp_path / "streamed", "--no-model", *flags, *ours).exit_code == 0
    assert merges.phlora(config, tmp_path / "both", *flags, *ours).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "streamed").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "phlora_report.json",
    ]
    same(merges.tensors(tmp_path / "both"), stored)
    source = three / "tuned" if method == "phlora" else tmp_path / "stored"
    peft_posthoc.extract(str(base), str(source), 8).save(tmp_path / "by hand")
    adapters_are_the_same(tmp_path / "streamed", tmp_path / "by hand")
    adapters_are_the_same(tmp_path / "both/phlora", tmp_path / "by hand")


def test_what_is_not_stored_is_not_rounded_either(tmp_path):
    # A change that bfloat16 would swallow, of exact rank 4.
    pair = models.save_pair(models.llama(), tmp_path, scale=1e-5, rank=4)
    for asked in ({"dtype": "bfloat16"}, {"dtype": "float32", "out_dtype": "bfloat16"}):
        for method, parts in (("phlora", {"parameters": {"rank": 4}}), ("task_arithmetic", {"each": {"weight": 1.0}})):
            config = merges.config(*pair, method=method, **parts, **asked)
            out = tmp_path / f"{method}-{asked['dtype']}"
            flags = ["--dtype", "float32"] + ([] if method == "phlora" else ["--rank", "4"])
            assert merges.phlora(config, out, "--no-model", *flags).exit_code == 0
            true, got = models.true_deltas(*pair), models.lora_deltas(models.load_adapter(pair[0], out))
            for module, delta in got.items():
                wanted = true[f"{module}.weight"]
                assert (delta - wanted).norm() <= 1e-2 * wanted.norm(), (method, asked, module)


def test_a_type_narrower_than_the_files_is_warned_of(llama_pair, tmp_path, caplog):
    merges.merged_by(merges.config(*llama_pair, parameters={"rank": 8}, dtype="bfloat16"), tmp_path / "out")
    assert any("small changes are rounded away" in message for message in caplog.messages)


def test_files_of_another_type_than_their_config_says_are_warned_of(tmp_path, caplog):
    base = models.llama()
    models.save(models.llama().to(torch.bfloat16), tmp_path / "base")
    models.save(models.tuned_from(base), tmp_path / "tuned")
    config = merges.config(tmp_path / "base", tmp_path / "tuned", method="task_arithmetic", each={"weight": 1.0})
    merges.merged_by(config, tmp_path / "out")
    assert any("hold float32, its config.json says bfloat16" in message for message in caplog.messages)


def test_tensors_that_mergekit_does_not_merge_are_rows_with_their_change(tmp_path):
    pair = models.save_pair(models.llama(), tmp_path)
    for folder, extra in zip(pair, ({"extra.weight": 1}, {"extra.weight": 3, "v_head.weight": 5}), strict=True):
        tensors = merges.tensors(folder) | {name: torch.full((4, 4), float(v)) for name, v in extra.items()}
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    config = merges.config(*pair, parameters={"rank": 8})
    assert merges.phlora(config, tmp_path / "out", "--no-model").exit_code == 0
    report = json.loads((tmp_path / "out/phlora_report.json").read_text())
    rows = {row["weight"]: row for row in report["rows"] if "layers" not in row["weight"]}
    assert rows["extra.weight"]["reason"] == rows["v_head.weight"]["reason"] == "mergekit does not merge this tensor"
    assert rows["extra.weight"]["delta_norm"] == 8.0
    assert rows["v_head.weight"]["tuned_norm"] == 20.0


def test_an_optional_weight_that_the_merge_drops_is_dropped(tmp_path):
    base = models.llama(tie_word_embeddings=True)
    tied, untied = models.tuned_from(base), models.llama()
    untied.load_state_dict(models.tuned_from(base).state_dict())
    folders = [models.save(one, tmp_path / name) for name, one in (("base", base), ("tied", tied), ("untied", untied))]
    config = merges.config(*folders, method="model_stock")
    stored = merges.stock(config, tmp_path / "stored")
    result = merges.phlora(config, tmp_path / "streamed", "--no-model", "--rank", "8")
    assert result.exit_code == 0, result.output
    peft_posthoc.extract(str(folders[0]), str(tmp_path / "stored"), 8).save(tmp_path / "by hand")
    assert stored
    adapters_are_the_same(tmp_path / "streamed", tmp_path / "by hand")


def test_the_seed_holds_whatever_was_drawn_before(three, tmp_path, monkeypatch):
    config = merges.config(three / "base", three / "tuned", method="dare_ties", each={"weight": 1.0, "density": 0.5})
    flags = ["--no-model", "--rank", "8", "--random-seed", "7"]
    merges.phlora(config, tmp_path / "one", *flags)
    extract = command.extract
    monkeypatch.setattr(command, "extract", lambda *sides, **how: (torch.rand(9), extract(*sides, **how))[1])
    merges.phlora(config, tmp_path / "two", *flags)
    adapters_are_the_same(tmp_path / "one", tmp_path / "two")


def test_stock_mergekit_merges_the_adapter_back_without_a_plugin(llama_pair, tmp_path):
    peft_posthoc.extract(*llama_pair, 8, dtype=torch.float32).save(tmp_path / "adapter")
    config = merges.config(None, f"{llama_pair[0]}+{tmp_path / 'adapter'}", method="passthrough")
    got = merges.stock(config, tmp_path / "out", "--lora-merge-cache", str(tmp_path / "cache"))
    wanted = merges.expected(*llama_pair, 8)
    for name in wanted:
        # PEFT computes (b @ a) once more, from padded factors.
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-7)


def test_adapters_are_combined_without_a_plugin_into_one(three, tmp_path):
    base = three / "base"
    for name in ("tuned", "tuned-too"):
        peft_posthoc.extract(str(base), str(three / name), 8).save(tmp_path / f"{name}-adapter")
    models_and_adapters = [f"{base}+{tmp_path / name}-adapter" for name in ("tuned", "tuned-too")]
    config = merges.config(base, *models_and_adapters, method="ties", each={"weight": 0.5, "density": 0.6})
    cache = ["--lora-merge-cache", str(tmp_path / "cache")]
    merges.stock(config, tmp_path / "stored", *cache)
    result = merges.phlora(config, tmp_path / "streamed", "--no-model", "--rank", "8", *cache)
    assert result.exit_code == 0, result.output
    peft_posthoc.extract(str(base), str(tmp_path / "stored"), 8).save(tmp_path / "by hand")
    adapters_are_the_same(tmp_path / "streamed", tmp_path / "by hand")


def test_the_same_in_memory_by_mergekits_own_function(llama_pair):
    from mergekit.merge_methods import merge_state_dicts

    register()
    base, tuned = (merges.tensors(folder) for folder in llama_pair)
    got = merge_state_dicts({"base": base, "tuned": tuned}, "phlora", base="base", parameters={"rank": 8})
    same(got, merges.expected(*llama_pair, 8))


def test_mergekit_pytorch_takes_it_too(llama_pair, tmp_path):
    from mergekit.scripts import merge_raw_pytorch

    register()
    files = [Path(folder) / "model.safetensors" for folder in llama_pair]
    config = merges.config(*files, parameters={"rank": 8})
    result = merges.phlora(config, tmp_path / "out", main=merge_raw_pytorch.main)
    assert result.exit_code == 0, result.output
    same(merges.tensors(tmp_path / "out"), merges.expected(*llama_pair, 8))


def test_a_change_that_has_no_known_form_is_warned_of_where_it_is_dropped(tmp_path, caplog, monkeypatch):
    from mergekit.scripts import merge_raw_pytorch

    register()
    monkeypatch.setattr(PHLORA, "_told", set())
    files = [Path(folder) / "model.safetensors" for folder in models.save_pair(models.gpt2(), tmp_path)]
    result = merges.phlora(merges.config(*files, parameters={"rank": 8}), tmp_path / "out", main=merge_raw_pytorch.main)
    assert result.exit_code == 0, result.output
    # Once for all layers: which way round a `c_attn` is stored cannot be seen.
    (message,) = (message for message in caplog.messages if "c_attn" in message)
    assert "no LoRA form that is known here" in message


@pytest.mark.parametrize("experts", ["per-expert", "fused"])
@pytest.mark.parametrize("make", [models.mixtral, models.qwen3_moe], ids=lambda make: make.__name__)
def test_the_experts_of_a_merge_are_carried_stored_or_not(make, experts, tmp_path):
    pair = models.save_pair(make(), tmp_path)
    config = merges.config(*pair, method="task_arithmetic", each={"weight": 0.5})
    flags = ["--experts", experts, "--rank", "8"]
    assert merges.phlora(config, tmp_path / "streamed", "--no-model", *flags).exit_code == 0
    assert merges.phlora(config, tmp_path / "both", *flags).exit_code == 0
    wanted = extract(pair[0], str(tmp_path / "both"), 8, experts=experts)
    assert {layer for layer in wanted.layers if "experts" in layer}
    wanted.save(tmp_path / "by hand")
    adapters_are_the_same(tmp_path / "streamed", tmp_path / "by hand")
    adapters_are_the_same(tmp_path / "both/phlora", tmp_path / "by hand")


@pytest.fixture
def images(tmp_path):
    """(base, tuned) folders of a tiny Llama 4 with images."""
    torch.manual_seed(0)
    return models.save_pair(multimodal.llama4(), tmp_path)


def test_a_merge_of_models_with_images_is_served_as_their_language_model(images, tmp_path):
    config = merges.config(*images, method="task_arithmetic", each={"weight": 0.5})
    flags = ["--serve-as", "Llama4ForCausalLM", "--rank", "8"]
    assert merges.phlora(config, tmp_path / "streamed", "--no-model", *flags).exit_code == 0
    assert merges.phlora(config, tmp_path / "both", *flags).exit_code == 0
    wanted = extract(images[0], str(tmp_path / "both"), 8, serve_as="Llama4ForCausalLM")
    assert "model.layers.0.self_attn.q_proj" in wanted.factors
    wanted.save(tmp_path / "by hand")
    adapters_are_the_same(tmp_path / "streamed", tmp_path / "by hand")
    adapters_are_the_same(tmp_path / "both/phlora", tmp_path / "by hand")


def test_a_vocabulary_that_the_merge_changes_is_left_out_under_other_names_too(longer, tmp_path):
    llava = models.save(multimodal.llava(), tmp_path / "llava")
    flags = ["--no-model", "--serve-as", str(llava), "--embeddings", "--rank", "8"]
    assert merges.phlora(longer[1], tmp_path / "out", *flags).exit_code == 0
    rows = {row["weight"]: row for row in json.loads((tmp_path / "out/phlora_report.json").read_text())["rows"]}
    assert rows["model.language_model.layers.0.self_attn.q_proj.weight"]["status"] == "extracted"
    assert rows["model.language_model.embed_tokens.weight"]["reason"] == "the merge changes the vocabulary"


# What goes wrong.


def refused(result, *words):
    assert result.exit_code == 1, result.output
    assert result.output.count("\n") == 1
    for word in words:
        assert word in result.output


@pytest.mark.parametrize("where", ["parameters", "each"])
def test_a_misspelt_parameter_is_refused(where, llama_pair, tmp_path):
    config = merges.config(*llama_pair, **{where: {"rnk": 8}})
    refused(merges.phlora(config, tmp_path / "out"), "no parameter `rnk`", "rank, rest")
    with pytest.raises(peft_posthoc.PosthocError, match="no parameter `rnk`"):
        merges.stock(config, tmp_path / "stock")
    assert not (tmp_path / "out").exists()


def test_other_methods_keep_their_parameters(three, tmp_path):
    config = merges.config(three / "base", three / "tuned", method="ties", each={"weight": 1.0, "madeup": 3})
    assert merges.stock(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"rank": "abc"}, "valid number"),
        ({"rank": -1}, "greater than or equal to 0"),
        ({"energy": 1.5}, "less than or equal to 1"),
        ({"rest": "other"}, "'base' or 'tuned'"),
        ({"rank": 8, "energy": 0.9}, "both `rank` and `energy`"),
        ({"rank": 0}, "no weight a rank"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(parameters, word, llama_pair, tmp_path):
    refused(merges.phlora(merges.config(*llama_pair, parameters=parameters), tmp_path / "out"), word)


@pytest.mark.parametrize(
    "flags",
    [["--serve-as", "LlamaForCausalLM"], ["--vocab", "truncate"], ["--experts", "fused"], ["--conv"]],
    ids=lambda flags: flags[0],
)
def test_what_the_merged_model_cannot_follow_is_refused(flags, llama_pair, tmp_path):
    config = merges.config(*llama_pair, parameters={"rank": 8})
    refused(merges.phlora(config, tmp_path / "out", *flags), f"use `phlora extract {flags[0]}`")


def test_mergekits_own_rules_end_in_a_line(three, tmp_path):
    base, tuned, more = (three / name for name in ("base", "tuned", "tuned-too"))
    refused(merges.phlora(merges.config(None, tuned, more), tmp_path / "out"), "names no `base_model`")
    refused(merges.phlora(merges.config(base, tuned, more), tmp_path / "out"), "requires exactly 2 inputs")
    wide = models.save(models.llama(intermediate_size=64), tmp_path / "wide")
    refused(merges.phlora(merges.config(base, wide), tmp_path / "out"), "other shapes")
    refused(merges.phlora(merges.config(base, tuned, method="made-up"), tmp_path / "out"), "made-up")
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_told_before_the_merge_is_written(three, tmp_path):
    config = merges.config(three / "base", three / "tuned", method="ties", each={"weight": 1.0, "density": 0.5})
    for flags, word in (
        (["--rank", "4", "--energy", "0.5"], "not both"),
        (["--rank", "0"], "at least 1"),
        (["--include", "["], "not a regular expression"),
        (["--exclude", "nothinglikethis"], "matches no weight"),
        (["--device", "cuda:7"], "no device `cuda:7`"),
    ):
        result = merges.phlora(config, tmp_path / "out", *flags)
        assert result.exit_code in (1, 2), flags
        assert word in result.output
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [("a: b\n---\nc: d\n", "2 configurations"), ("a: [", "is no YAML"), ("just text", "holds no configuration")],
)
def test_a_file_that_is_no_configuration_is_told(text, word, tmp_path):
    refused(merges.phlora(text, tmp_path / "out"), word)


def test_a_merge_that_fails_leaves_no_adapter(llama_pair, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_merge", fail)
    result = merges.phlora(merges.config(*llama_pair, parameters={"rank": 8}), tmp_path / "out")
    assert result.exit_code == 130
    assert result.output == "mergekit-phlora: error: Interrupted. There is no adapter.\n"
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_mergekit_cannot_merge_is_refused_by_us_too(tmp_path):
    pair = models.save_pair(models.t5(), tmp_path)
    config = merges.config(*pair, parameters={"rank": 8})
    refused(merges.phlora(config, tmp_path / "out", "--no-model"), "wi_0.weight", "cannot merge such a model")


@pytest.mark.parametrize(
    ("parameters", "rule"),
    [
        ({"error": 0.5}, keep_error(0.5)),
        ({"rank": "auto", "max_rank": 6}, limited(above_noise(), most=6)),
        ({"energy": 0.3, "min_rank": 4, "round_to": 4}, limited(keep_energy(0.3), least=4, multiple=4)),
    ],
)
def test_rules_and_limits_mean_what_they_mean_elsewhere(parameters, rule, llama_pair, tmp_path):
    config = merges.config(*llama_pair, parameters=parameters)
    merged = merges.stock(config, tmp_path / "stock")
    adapter = extract(*llama_pair, rule)
    base = load_file(Path(llama_pair[0]) / "model.safetensors")
    for name, layer in adapter.layers.items():
        assert torch.allclose(merged[name], base[name] + layer.factors.b @ layer.factors.a, atol=1e-6)


def test_a_budget_takes_the_place_of_the_ranks(llama_pair, tmp_path):
    config = merges.config(*llama_pair, parameters={"rank": [{"filter": "k_proj", "value": 0}, {"value": 3}]})
    merged = merges.merged_by(config, tmp_path / "out", "--budget", "70kB")
    file = tmp_path / "out/phlora/adapter_model.safetensors"
    assert 40_000 < file.stat().st_size <= 70_000
    factors = load_file(file)
    base = load_file(Path(llama_pair[0]) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert len(a) > 3
    assert torch.allclose(merged[f"{name}.weight"], base[f"{name}.weight"] + b @ a, atol=1e-6)
    assert torch.equal(merged["model.layers.0.self_attn.k_proj.weight"], base["model.layers.0.self_attn.k_proj.weight"])


def test_ranks_on_the_command_line_are_refused_where_the_configuration_has_them(llama_pair, tmp_path):
    config = merges.config(*llama_pair, parameters={"rank": 8})
    for flags in (["--rank", "4"], ["--rank", "0"], ["--energy", "0"], ["--head"], ["--include", "mlp"]):
        refused(merges.phlora(config, tmp_path / "out", *flags), f"`{flags[0]}` belongs among the `parameters`")


def test_the_adapter_never_goes_into_the_models_own_folder(llama_pair, tmp_path):
    config = merges.config(*llama_pair, parameters={"rank": 8})
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for same_folder in (tmp_path / "out", tmp_path / "other/../out", tmp_path / "link"):
        refused(merges.phlora(config, tmp_path / "out", "--adapter-out", str(same_folder)), "Choose another folder")
    merges.merged_by(config, tmp_path / "out")
    assert not (tmp_path / "out/adapter_config.json").exists()
    # transformers reads the merged model, and nothing on top of it.
    loaded = dict(models.load(tmp_path / "out").named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in merges.tensors(tmp_path / "out").items())


def test_a_base_with_an_adapter_is_refused(llama_pair, tmp_path):
    config = merges.config(f"{llama_pair[0]}+some/adapter", llama_pair[1], parameters={"rank": 8})
    refused(merges.phlora(config, tmp_path / "out"), "Merge the two first")


def test_registering_twice_is_the_same_as_once():
    from mergekit import merge_methods

    register()
    register()
    assert [method.spec.name for method in merge_methods.registered_methods()].count("phlora") == 1


# The examples, in processes of their own.


@pytest.fixture
def here(three, tmp_path):
    for folder in three.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    for example in EXAMPLES.glob("*.yml"):
        shutil.copy(example, tmp_path)
    return tmp_path


EXAMPLE_COMMANDS = {
    "phlora.yml": ["-m", "mergekit_plugin", "phlora.yml", "out"],
    "layers.yml": ["-m", "mergekit_plugin", "layers.yml", "out", "--adapter-out", "out-adapter"],
    "ties.yml": ["-m", "mergekit_plugin", "ties.yml", "out", "--no-model", "--rank", "16"],
    "several.yml": ["-c", "{register}; {multi}", "several.yml", "-I", "./stages", "--out-path", "out"],
    "passthrough.yml": ["-m", "mergekit.scripts.run_yaml", "passthrough.yml", "out", "--lora-merge-cache", "cache"],
}
INLINE = {
    "register": "from mergekit_plugin import register; register()",
    "multi": "from mergekit.scripts.multimerge import main; main()",
}


def test_every_example_is_run():
    assert EXAMPLE_COMMANDS.keys() == {path.name for path in EXAMPLES.iterdir()}


@pytest.mark.parametrize("name", EXAMPLE_COMMANDS)
def test_an_example(name, here):
    if name == "passthrough.yml":
        peft_posthoc.extract(str(here / "base"), str(here / "tuned"), 8).save(here / "adapter")
    ran = merges.run(*(part.format(**INLINE) for part in EXAMPLE_COMMANDS[name]), cwd=here)
    assert ran.returncode == 0, ran.stderr
    parts = list(yaml.safe_load_all((here / name).read_text()))
    if name == "ties.yml":
        assert (here / "out/adapter_model.safetensors").is_file()
        return
    got = merges.tensors(here / "out")
    assert {tensor.dtype for tensor in got.values()} == {
        getattr(torch, parts[-1].get("out_dtype") or parts[-1]["dtype"])
    }
    if name == "phlora.yml":
        wanted = merges.expected(here / "base", here / "tuned", 16)
        same(got, {key: tensor.bfloat16() for key, tensor in wanted.items()})
    if name == "several.yml":
        same(merges.tensors(here / "stages/first"), merges.expected(here / "base", here / "tuned", 16))
        same(merges.tensors(here / "stages/second"), merges.expected(here / "base", here / "tuned-too", 0.8))
