"""Quantised bases on every surface: what each makes is what Python makes."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peft_posthoc
from hf_callbacks import PosthocLoraCallback
from tests.make import coded_folders, mergekit_runs, models, trainer_runs


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model, its form in FP8, and a fine-tune in 16 bits."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("pair")
    base, tuned = models.save_pair(models.llama(), where)
    return base, coded_folders.quantise(base, where / "fp8", coded_folders.fp8), tuned


def by_callback(base, tuned, out, **options):
    with tempfile.TemporaryDirectory() as folder:
        callback = PosthocLoraCallback(4, base=base, when="end", background=False, strict=True, **options)
        training = trainer_runs.trainer(models.load(tuned), folder, callback, max_steps=1, learning_rate=0.0)
        training.compute_loss = lambda model, *_, **__: sum(p.sum() for p in model.parameters())
        training.train()
        shutil.copytree(Path(folder) / "phlora/final", out)


def by_mergekit(base, tuned, out, **options):
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    content = mergekit_runs.config(None, tuned, method="passthrough")
    result = mergekit_runs.phlora(content, out, "--no-model", "--base", base, "--rank", "4", *flags)
    assert result.exit_code == 0, result.output


def by_peft(base, tuned, out):
    config = peft_posthoc.LoraConfig.from_delta(base, tuned, r=4)
    config.delta.adapter.save(out)


@pytest.mark.parametrize("surface", [by_callback, by_mergekit, by_peft], ids=lambda surface: surface.__name__)
@pytest.mark.parametrize("how", ["base", "for_base"])
def test_a_surface_makes_of_a_quantised_base_what_python_makes(surface, how, pair, tmp_path):
    base, low, tuned = pair
    if how == "for_base" and surface is by_peft:
        pytest.skip("PEFT's configuration is for the model that is at hand")
    first, options = (low, {}) if how == "base" else (base, {"for_base": low})
    wanted = peft_posthoc.extract(first, tuned, 4, **options).save(tmp_path / "wanted")
    surface(first, tuned, tmp_path / "out", **options)
    both = [load_file(folder / "adapter_model.safetensors") for folder in (wanted, tmp_path / "out")]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(value, both[1][name]) for name, value in both[0].items())
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (wanted, tmp_path / "out")]
    assert {Path(config["base_model_name_or_path"]).name for config in configs} == {"fp8"}
    if surface is by_callback:
        card = (tmp_path / "out/README.md").read_text()
        assert f"vllm serve {low} " in card
        assert f"weight delta between `{first}`" in card


def test_a_merge_of_codes_is_refused_with_what_to_give(pair, tmp_path):
    base, low, tuned = pair
    for both in ((low, tuned), (base, low)):
        result = mergekit_runs.phlora(mergekit_runs.config(*both), tmp_path / "out", "--no-model")
        assert result.exit_code == 1
        assert f"`{low}` holds `" in result.output
        assert "mergekit would merge its codes (a quantised base that is in no part of the merge" in result.output
