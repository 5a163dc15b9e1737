"""The callback in runs of two processes: plain, and with the model's weights spread over both."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from peft_posthoc import extract
from tests.make import models
from tests.make.launched import launched

# The classes of the model and of its weights, and what accelerate says that it does.
SETUPS = {
    "ddp": ("LlamaForCausalLM", "MULTI_CPU", "Tensor"),
    "fsdp-full": ("FSDPLlamaForCausalLM", "FSDP", "DTensor"),
    "fsdp-sharded": ("FSDPLlamaForCausalLM", "FSDP", "DTensor"),
    "native-fsdp": ("FSDPLlamaForCausalLM", "MULTI_CPU", "DTensor"),
    "native-tp": ("LlamaForCausalLM", "MULTI_CPU", "DTensor"),
    # With `make test-distributed`, which installs DeepSpeed.
    "zero2": ("LlamaForCausalLM", "DEEPSPEED", "Tensor"),
    "zero3": ("LlamaForCausalLM", "DEEPSPEED", "Tensor"),
    "zero3-partitions": ("LlamaForCausalLM", "DEEPSPEED", "Tensor"),
    "zero3-partitions-end": ("LlamaForCausalLM", "DEEPSPEED", "Tensor"),
}


def trained(*arguments):
    return launched("tests.make.distributed_run", *arguments, DS_ACCELERATOR="cpu")


@pytest.mark.parametrize("setup", SETUPS)
def test_every_checkpoint_of_two_processes_gets_its_adapter(setup, llama_pair, tmp_path):
    if setup.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed.")
    base = llama_pair[0]
    ran = trained(setup, tmp_path / "run", base)
    assert ran.returncode == 0, ran.stderr[-3000:]
    # That it was what it is called: accelerate falls back to plain processes without a word.
    model, kind, weight = SETUPS[setup]
    assert f"{model} DistributedType.{kind} {weight}" in ran.stdout
    out = tmp_path / "run/phlora"
    steps = [] if setup.endswith("-end") else ["energy.png", "step-2", "step-4"]
    assert sorted(path.name for path in out.iterdir()) == sorted(["README.md", "final", *steps])
    checkpoint = tmp_path / "run/checkpoint-4"
    assert any(checkpoint.rglob("*.distcp")) == (setup == "fsdp-sharded")
    assert (checkpoint / "model.safetensors").exists() == (setup != "fsdp-sharded" and "partitions" not in setup)
    if "partitions" in setup:
        checkpoint = models.save(put_together(checkpoint, base), tmp_path / "whole")

    extract(base, checkpoint, 8).save(tmp_path / "by-hand")
    ours, by_hand = (
        load_file(folder / "adapter_model.safetensors") for folder in (out / "final", tmp_path / "by-hand")
    )
    assert ours.keys() == by_hand.keys()
    assert all(torch.equal(ours[name], by_hand[name]) for name in ours)
    got = models.lora_deltas(models.load_adapter(base, out / ("step-2" if steps else "final")))
    assert all(delta.any() for delta in got.values())
    assert len(got) == 14
    # Two processes train the same model in every set-up.
    energy = json.loads((out / "final/phlora_report.json").read_text())["totals"]["energy"]
    if setup == "ddp":
        _known["ddp"] = energy
    assert energy == pytest.approx(energy_of_ddp(base, tmp_path), rel=1e-3)


def test_weights_that_are_spread_and_were_not_saved_are_told(llama_pair, tmp_path):
    # The first process alone must not wait for parts that only the others hold.
    ran = trained("native-fsdp-unsaved", tmp_path / "run", llama_pair[0])
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "there is no adapter `final`: the weights are spread over processes, and were not saved" in ran.stderr
    assert not (tmp_path / "run/phlora").exists()


def put_together(checkpoint, base):
    """The model in DeepSpeed's partitions, as its own tool reads them."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    model = models.load(base)
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint))
    return model


_known = {}


def energy_of_ddp(base, tmp_path):
    """The energy that the same run's adapter keeps without any sharding."""
    if "ddp" not in _known:
        folder = tmp_path / "run-ddp"
        assert trained("ddp", folder, base).returncode == 0
        _known["ddp"] = json.loads((folder / "phlora/final/phlora_report.json").read_text())["totals"]["energy"]
    return _known["ddp"]
