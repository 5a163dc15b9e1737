"""What a merge, or its adapter, is refused for."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peft_posthoc
from mergekit_plugin import command, register
from peft_posthoc import above_noise, extract, keep_energy, keep_error, limited
from tests.make import mergekit_runs, models
from tests.make.mergekit_runs import refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("where", ["parameters", "each"])
def test_a_misspelt_parameter_is_refused(where, llama_pair, tmp_path):
    config = mergekit_runs.config(*llama_pair, **{where: {"rnk": 8}})
    refused(mergekit_runs.phlora(config, tmp_path / "out"), "no parameter `rnk`", "rank, rest")
    with pytest.raises(peft_posthoc.PosthocError, match="no parameter `rnk`"):
        mergekit_runs.stock(config, tmp_path / "stock")
    assert not (tmp_path / "out").exists()


def test_other_methods_keep_their_parameters(three, tmp_path):
    config = mergekit_runs.config(three / "base", three / "tuned", method="ties", each={"weight": 1.0, "madeup": 3})
    assert mergekit_runs.stock(config, tmp_path / "out")


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
    refused(mergekit_runs.phlora(mergekit_runs.config(*llama_pair, parameters=parameters), tmp_path / "out"), word)


@pytest.mark.parametrize(
    "flags",
    [["--serve-as", "LlamaForCausalLM"], ["--vocab", "truncate"], ["--experts", "fused"], ["--conv"]],
    ids=lambda flags: flags[0],
)
def test_what_the_merged_model_cannot_follow_is_refused(flags, llama_pair, tmp_path):
    config = mergekit_runs.config(*llama_pair, parameters={"rank": 8})
    refused(mergekit_runs.phlora(config, tmp_path / "out", *flags), f"use `phlora extract {flags[0]}`")


def test_a_base_and_one_fine_tune_of_it_are_needed(three, tmp_path):
    base, tuned, more = (three / name for name in ("base", "tuned", "tuned-too"))
    cases = {
        "needs `base_model`: the model": mergekit_runs.config(None, tuned, parameters={"rank": 8}),
        f"one fine-tune of `{base}` among `models`. Got `{tuned}`, `{more}`.": mergekit_runs.config(base, tuned, more),
        f"one fine-tune of `{base}` among `models`. Got none.": mergekit_runs.config(base, base),
    }
    for said, config in cases.items():
        refused(mergekit_runs.phlora(config, tmp_path / "out"), said)
        with pytest.raises(peft_posthoc.PosthocError, match=re.escape(said)):
            mergekit_runs.stock(config, tmp_path / "out")


def test_mergekits_own_rules_end_in_a_line(three, tmp_path):
    base, tuned, more = (three / name for name in ("base", "tuned", "tuned-too"))
    none = mergekit_runs.config(None, tuned, more, method="linear", each={"weight": 0.5})
    refused(mergekit_runs.phlora(none, tmp_path / "out"), "names no `base_model`", "Say with `--base`")
    wide = models.save(models.llama(intermediate_size=64), tmp_path / "wide")
    refused(mergekit_runs.phlora(mergekit_runs.config(base, wide), tmp_path / "out"), "in tuned than in base")
    refused(mergekit_runs.phlora(mergekit_runs.config(base, tuned, method="made-up"), tmp_path / "out"), "made-up")
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_told_before_the_merge_is_written(three, tmp_path):
    config = mergekit_runs.config(three / "base", three / "tuned", method="ties", each={"weight": 1.0, "density": 0.5})
    for flags, word in (
        (["--rank", "4", "--energy", "0.5"], "not both"),
        (["--rank", "0"], "at least 1"),
        (["--include", "["], "not a regular expression"),
        (["--exclude", "nothinglikethis"], "matches no weight"),
        (["--device", "cuda:7"], "no device `cuda:7`"),
    ):
        result = mergekit_runs.phlora(config, tmp_path / "out", *flags)
        assert result.exit_code in (1, 2), flags
        assert word in result.output
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [("a: b\n---\nc: d\n", "2 configurations"), ("a: [", "is no YAML"), ("just text", "holds no configuration")],
)
def test_a_file_that_is_no_configuration_is_told(text, word, tmp_path):
    refused(mergekit_runs.phlora(text, tmp_path / "out"), word)


def test_a_merge_that_fails_leaves_no_adapter(llama_pair, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_merge", fail)
    result = mergekit_runs.phlora(mergekit_runs.config(*llama_pair, parameters={"rank": 8}), tmp_path / "out")
    assert result.exit_code == 130
    assert result.output == "mergekit-phlora: error: Interrupted. There is no adapter.\n"
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_mergekit_cannot_merge_is_refused_by_us_too(tmp_path):
    pair = models.save_pair(models.t5(), tmp_path)
    config = mergekit_runs.config(*pair, parameters={"rank": 8})
    refused(mergekit_runs.phlora(config, tmp_path / "out", "--no-model"), "wi_0.weight", "cannot merge such a model")


@pytest.mark.parametrize(
    ("parameters", "rule"),
    [
        ({"error": 0.5}, keep_error(0.5)),
        ({"rank": "auto", "max_rank": 6}, limited(above_noise(), most=6)),
        ({"energy": 0.3, "min_rank": 4, "round_to": 4}, limited(keep_energy(0.3), least=4, multiple=4)),
    ],
)
def test_rules_and_limits_mean_what_they_mean_elsewhere(parameters, rule, llama_pair, tmp_path):
    config = mergekit_runs.config(*llama_pair, parameters=parameters)
    merged = mergekit_runs.stock(config, tmp_path / "stock")
    adapter = extract(*llama_pair, rule)
    base = load_file(Path(llama_pair[0]) / "model.safetensors")
    for name, layer in adapter.layers.items():
        assert torch.allclose(merged[name], base[name] + layer.factors.b @ layer.factors.a, atol=1e-6)


def test_a_budget_takes_the_place_of_the_ranks(llama_pair, tmp_path):
    config = mergekit_runs.config(*llama_pair, parameters={"rank": [{"filter": "k_proj", "value": 0}, {"value": 3}]})
    merged = mergekit_runs.merged_by(config, tmp_path / "out", "--budget", "70kB")
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
    config = mergekit_runs.config(*llama_pair, parameters={"rank": 8})
    for flags in (["--rank", "4"], ["--rank", "0"], ["--energy", "0"], ["--head"], ["--include", "mlp"]):
        refused(mergekit_runs.phlora(config, tmp_path / "out", *flags), f"`{flags[0]}` belongs among the `parameters`")


def test_the_adapter_never_goes_into_the_models_own_folder(llama_pair, tmp_path):
    config = mergekit_runs.config(*llama_pair, parameters={"rank": 8})
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for same_folder in (tmp_path / "out", tmp_path / "other/../out", tmp_path / "link"):
        refused(
            mergekit_runs.phlora(config, tmp_path / "out", "--adapter-out", str(same_folder)), "Choose another folder"
        )
    mergekit_runs.merged_by(config, tmp_path / "out")
    assert not (tmp_path / "out/adapter_config.json").exists()
    # transformers reads the merged model, and nothing on top of it.
    loaded = dict(models.load(tmp_path / "out").named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in mergekit_runs.tensors(tmp_path / "out").items())


def test_a_base_with_an_adapter_is_refused(llama_pair, tmp_path):
    config = mergekit_runs.config(f"{llama_pair[0]}+some/adapter", llama_pair[1], parameters={"rank": 8})
    refused(mergekit_runs.phlora(config, tmp_path / "out"), "Merge the two first")


def test_registering_twice_is_the_same_as_once():
    from mergekit import merge_methods

    register()
    register()
    assert [method.spec.name for method in merge_methods.registered_methods()].count("phlora") == 1
