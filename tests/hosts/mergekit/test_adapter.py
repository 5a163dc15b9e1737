"""The adapter of a merge by whatever method."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import peft_posthoc
from mergekit_plugin import command, register
from mergekit_plugin.method import PHLORA
from peft_posthoc import extract
from tests.make import mergekit_runs, models, multimodal
from tests.make.mergekit_runs import adapters_are_the_same, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


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
    config = mergekit_runs.config(None if method == "linear" else base, *tuned, method=method, **METHODS[method])
    flags = ["--random-seed", "7"] + (["--base", str(base)] if method == "linear" else [])
    ours = [] if method == "phlora" else ["--rank", "8"]
    stored = mergekit_runs.stock(config, tmp_path / "stored", *flags[:2])
    assert mergekit_runs.phlora(config, tmp_path / "streamed", "--no-model", *flags, *ours).exit_code == 0
    assert mergekit_runs.phlora(config, tmp_path / "both", *flags, *ours).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "streamed").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "phlora_report.json",
    ]
    same(mergekit_runs.tensors(tmp_path / "both"), stored)
    source = three / "tuned" if method == "phlora" else tmp_path / "stored"
    peft_posthoc.extract(str(base), str(source), 8).save(tmp_path / "by hand")
    adapters_are_the_same(tmp_path / "streamed", tmp_path / "by hand")
    adapters_are_the_same(tmp_path / "both/phlora", tmp_path / "by hand")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_mean_that_stands_in_for_a_base_is_what_linear_writes(dtype, tmp_path):
    base = models.llama().to(getattr(torch, dtype))
    siblings = [models.save(models.tuned_from(base), tmp_path / name) for name in "abc"]
    parts = {"each": {"weight": 1}, "dtype": "float32", "out_dtype": dtype}
    merged = mergekit_runs.stock(mergekit_runs.config(None, *siblings, method="linear", **parts), tmp_path / "mean")
    mean = peft_posthoc.open_checkpoint(f"mean:{','.join(map(str, siblings))}")
    for name, tensor in merged.items():
        torch.testing.assert_close(mean.read(name), tensor)
    adapter = extract(mean, str(siblings[0]), 8)
    adapter.save(tmp_path / "adapter")
    found = peft_posthoc.verify(tmp_path / "adapter", tmp_path / "mean", siblings[0], outputs=False)
    assert found.energy == pytest.approx(adapter.report.totals.energy_of_all, abs=0.01)


def test_what_is_not_stored_is_not_rounded_either(tmp_path):
    # A change that bfloat16 would swallow, of exact rank 4.
    pair = models.save_pair(models.llama(), tmp_path, scale=1e-5, rank=4)
    for asked in ({"dtype": "bfloat16"}, {"dtype": "float32", "out_dtype": "bfloat16"}):
        for method, parts in (("phlora", {"parameters": {"rank": 4}}), ("task_arithmetic", {"each": {"weight": 1.0}})):
            config = mergekit_runs.config(*pair, method=method, **parts, **asked)
            out = tmp_path / f"{method}-{asked['dtype']}"
            flags = ["--dtype", "float32"] + ([] if method == "phlora" else ["--rank", "4"])
            assert mergekit_runs.phlora(config, out, "--no-model", *flags).exit_code == 0
            true, got = models.true_deltas(*pair), models.lora_deltas(models.load_adapter(pair[0], out))
            for module, delta in got.items():
                wanted = true[f"{module}.weight"]
                assert (delta - wanted).norm() <= 1e-2 * wanted.norm(), (method, asked, module)


def test_a_type_narrower_than_the_files_is_warned_of(llama_pair, tmp_path, caplog):
    mergekit_runs.merged_by(
        mergekit_runs.config(*llama_pair, parameters={"rank": 8}, dtype="bfloat16"), tmp_path / "out"
    )
    assert any("small changes are rounded away" in message for message in caplog.messages)


def test_files_of_another_type_than_their_config_says_are_warned_of(tmp_path, caplog):
    base = models.llama()
    models.save(models.llama().to(torch.bfloat16), tmp_path / "base")
    models.save(models.tuned_from(base), tmp_path / "tuned")
    config = mergekit_runs.config(tmp_path / "base", tmp_path / "tuned", method="task_arithmetic", each={"weight": 1.0})
    mergekit_runs.merged_by(config, tmp_path / "out")
    assert any("hold float32, its config.json says bfloat16" in message for message in caplog.messages)


def test_tensors_that_mergekit_does_not_merge_are_rows_with_their_change(tmp_path):
    pair = models.save_pair(models.llama(), tmp_path)
    for folder, extra in zip(pair, ({"extra.weight": 1}, {"extra.weight": 3, "v_head.weight": 5}), strict=True):
        tensors = mergekit_runs.tensors(folder) | {name: torch.full((4, 4), float(v)) for name, v in extra.items()}
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    config = mergekit_runs.config(*pair, parameters={"rank": 8})
    assert mergekit_runs.phlora(config, tmp_path / "out", "--no-model").exit_code == 0
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
    config = mergekit_runs.config(*folders, method="model_stock")
    stored = mergekit_runs.stock(config, tmp_path / "stored")
    result = mergekit_runs.phlora(config, tmp_path / "streamed", "--no-model", "--rank", "8")
    assert result.exit_code == 0, result.output
    peft_posthoc.extract(str(folders[0]), str(tmp_path / "stored"), 8).save(tmp_path / "by hand")
    assert stored
    adapters_are_the_same(tmp_path / "streamed", tmp_path / "by hand")


def test_the_seed_holds_whatever_was_drawn_before(three, tmp_path, monkeypatch):
    config = mergekit_runs.config(
        three / "base", three / "tuned", method="dare_ties", each={"weight": 1.0, "density": 0.5}
    )
    flags = ["--no-model", "--rank", "8", "--random-seed", "7"]
    mergekit_runs.phlora(config, tmp_path / "one", *flags)
    extract = command.extract
    monkeypatch.setattr(command, "extract", lambda *sides, **how: (torch.rand(9), extract(*sides, **how))[1])
    mergekit_runs.phlora(config, tmp_path / "two", *flags)
    adapters_are_the_same(tmp_path / "one", tmp_path / "two")


def test_stock_mergekit_merges_the_adapter_back_without_a_plugin(llama_pair, tmp_path):
    peft_posthoc.extract(*llama_pair, 8, dtype=torch.float32).save(tmp_path / "adapter")
    config = mergekit_runs.config(None, f"{llama_pair[0]}+{tmp_path / 'adapter'}", method="passthrough")
    got = mergekit_runs.stock(config, tmp_path / "out", "--lora-merge-cache", str(tmp_path / "cache"))
    wanted = mergekit_runs.expected(*llama_pair, 8)
    for name in wanted:
        # PEFT computes (b @ a) once more, from padded factors.
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-7)


def test_adapters_are_combined_without_a_plugin_into_one(three, tmp_path):
    base = three / "base"
    for name in ("tuned", "tuned-too"):
        peft_posthoc.extract(str(base), str(three / name), 8).save(tmp_path / f"{name}-adapter")
    models_and_adapters = [f"{base}+{tmp_path / name}-adapter" for name in ("tuned", "tuned-too")]
    config = mergekit_runs.config(base, *models_and_adapters, method="ties", each={"weight": 0.5, "density": 0.6})
    cache = ["--lora-merge-cache", str(tmp_path / "cache")]
    mergekit_runs.stock(config, tmp_path / "stored", *cache)
    result = mergekit_runs.phlora(config, tmp_path / "streamed", "--no-model", "--rank", "8", *cache)
    assert result.exit_code == 0, result.output
    peft_posthoc.extract(str(base), str(tmp_path / "stored"), 8).save(tmp_path / "by hand")
    adapters_are_the_same(tmp_path / "streamed", tmp_path / "by hand")


def test_the_same_in_memory_by_mergekits_own_function(llama_pair):
    from mergekit.merge_methods import merge_state_dicts

    register()
    base, tuned = (mergekit_runs.tensors(folder) for folder in llama_pair)
    got = merge_state_dicts({"base": base, "tuned": tuned}, "phlora", base="base", parameters={"rank": 8})
    same(got, mergekit_runs.expected(*llama_pair, 8))


def test_mergekit_pytorch_takes_it_too(llama_pair, tmp_path):
    from mergekit.scripts import merge_raw_pytorch

    register()
    files = [Path(folder) / "model.safetensors" for folder in llama_pair]
    config = mergekit_runs.config(*files, parameters={"rank": 8})
    result = mergekit_runs.phlora(config, tmp_path / "out", main=merge_raw_pytorch.main)
    assert result.exit_code == 0, result.output
    same(mergekit_runs.tensors(tmp_path / "out"), mergekit_runs.expected(*llama_pair, 8))


def test_a_change_that_has_no_known_form_is_warned_of_where_it_is_dropped(tmp_path, caplog, monkeypatch):
    from mergekit.scripts import merge_raw_pytorch

    register()
    monkeypatch.setattr(PHLORA, "_told", set())
    files = [Path(folder) / "model.safetensors" for folder in models.save_pair(models.gpt2(), tmp_path)]
    result = mergekit_runs.phlora(
        mergekit_runs.config(*files, parameters={"rank": 8}), tmp_path / "out", main=merge_raw_pytorch.main
    )
    assert result.exit_code == 0, result.output
    # Once for all layers: which way round a `c_attn` is stored cannot be seen.
    (message,) = (message for message in caplog.messages if "c_attn" in message)
    assert "no LoRA form that is known here" in message


@pytest.mark.parametrize("experts", ["per-expert", "fused"])
@pytest.mark.parametrize("make", [models.mixtral, models.qwen3_moe], ids=lambda make: make.__name__)
def test_the_experts_of_a_merge_are_carried_stored_or_not(make, experts, tmp_path):
    pair = models.save_pair(make(), tmp_path)
    config = mergekit_runs.config(*pair, method="task_arithmetic", each={"weight": 0.5})
    flags = ["--experts", experts, "--rank", "8"]
    assert mergekit_runs.phlora(config, tmp_path / "streamed", "--no-model", *flags).exit_code == 0
    assert mergekit_runs.phlora(config, tmp_path / "both", *flags).exit_code == 0
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
    config = mergekit_runs.config(*images, method="task_arithmetic", each={"weight": 0.5})
    flags = ["--serve-as", "Llama4ForCausalLM", "--rank", "8"]
    assert mergekit_runs.phlora(config, tmp_path / "streamed", "--no-model", *flags).exit_code == 0
    assert mergekit_runs.phlora(config, tmp_path / "both", *flags).exit_code == 0
    wanted = extract(images[0], str(tmp_path / "both"), 8, serve_as="Llama4ForCausalLM")
    assert "model.layers.0.self_attn.q_proj" in wanted.factors
    wanted.save(tmp_path / "by hand")
    adapters_are_the_same(tmp_path / "streamed", tmp_path / "by hand")
    adapters_are_the_same(tmp_path / "both/phlora", tmp_path / "by hand")


def test_a_vocabulary_that_the_merge_changes_is_left_out_under_other_names_too(longer, tmp_path):
    llava = models.save(multimodal.llava(), tmp_path / "llava")
    flags = ["--no-model", "--serve-as", str(llava), "--embeddings", "--rank", "8"]
    assert mergekit_runs.phlora(longer[1], tmp_path / "out", *flags).exit_code == 0
    rows = {row["weight"]: row for row in json.loads((tmp_path / "out/phlora_report.json").read_text())["rows"]}
    assert rows["model.language_model.layers.0.self_attn.q_proj.weight"]["status"] == "extracted"
    assert rows["model.language_model.embed_tokens.weight"]["reason"] == "the merge changes the vocabulary"
