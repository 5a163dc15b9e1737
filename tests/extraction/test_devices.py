"""Work on several devices of one process: one weight at a time on each, and the same bits."""

import threading

import pytest
import torch

from peft_posthoc import extract
from peft_posthoc.compute.device import all_of, pick_device
from peft_posthoc.extraction import work
from peft_posthoc.extraction.delta import Pair


def test_cuda_is_every_gpu_unless_a_number_or_a_launcher_says_which(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert all_of(torch.device("cuda")) == [torch.device("cuda", index) for index in range(3)]
    assert all_of(torch.device("cuda:1")) == [torch.device("cuda:1")]
    assert all_of(torch.device("cpu")) == [torch.device("cpu")]
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.empty(1))  # there are none here to be tried
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert all_of(pick_device("cuda")) == [torch.device("cuda:2")]


@pytest.mark.parametrize("count", [2, 3])
def test_weights_are_worked_on_on_all_devices_at_a_time(count, llama_pair, tmp_path, monkeypatch):
    devices = [torch.device("cpu", index) for index in range(count)]
    # Weights of one size, so that as many as there are devices have room at a time.
    only = {"include": r"q_proj|o_proj|gate_proj|up_proj"}
    expected = extract(*llama_pair, 4, **only).save(tmp_path / "expected")
    monkeypatch.setattr(work, "all_of", lambda _: devices)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    together, used = threading.Barrier(count), []

    def on(pair, device):
        if len(used) < count:
            used.append(device)
            together.wait(60)
        return pair

    monkeypatch.setattr(Pair, "on", on)
    made = extract(*llama_pair, 4, **only).save(tmp_path / "made")
    assert sorted(used, key=str) == devices
    assert (made / "adapter_model.safetensors").read_bytes() == (expected / "adapter_model.safetensors").read_bytes()
