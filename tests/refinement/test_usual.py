"""The method that is taken where none is asked for."""

import torch

from peft_posthoc.refinement import usual
from peft_posthoc.refinement.blocks import blocks
from peft_posthoc.refinement.distil import distil
from peft_posthoc.refinement.usual import Usual

CPU = torch.device("cpu")


def test_where_two_models_do_not_fit_they_are_fitted_a_block_at_a_time(monkeypatch):
    """Two models of 1000 numbers in float32: 8000 bytes, three quarters of 10,667."""
    base, tuned = ({"weight": torch.ones(10, 100, dtype=torch.bfloat16)} for _ in range(2))
    monkeypatch.setattr(usual, "free_memory", lambda device: 10_700)
    assert isinstance(Usual().method(base, tuned, device=CPU), distil)
    monkeypatch.setattr(usual, "free_memory", lambda device: 10_600)
    assert isinstance(Usual().method(base, tuned, device=CPU), blocks)
    # In bfloat16, with half of the base on top: 10,000 bytes are three quarters of 13,334.
    for free, found in ((13_340, distil(bf16=True)), (13_330, blocks(bf16=True))):
        monkeypatch.setattr(usual, "free_memory", lambda device, free=free: free)
        assert Usual(bf16=True).method(base, tuned, device=CPU) == found


def test_gpus_of_which_none_holds_both_models_hold_a_part_each(monkeypatch):
    """Half of 8000 bytes, and 2000 of one model that writes, are three quarters of 8000; a CPU has one memory."""
    base, tuned = ({"weight": torch.ones(10, 100, dtype=torch.bfloat16)} for _ in range(2))
    gpu = torch.device("cuda")
    for free, found in ((10_700, distil(lr=0.1)), (8_000, distil(lr=0.1, shard=True)), (7_990, blocks(lr=0.1))):
        monkeypatch.setattr(usual, "free_memory", lambda device, free=free: free)
        assert Usual(lr=0.1).method(base, tuned, device=gpu, processes=2) == found
    monkeypatch.setattr(usual, "free_memory", lambda device: 10_700)
    assert Usual().method(base, tuned, device=CPU, processes=2) == blocks()


def test_live_models_are_in_memory_already(monkeypatch):
    monkeypatch.setattr(usual, "free_memory", lambda device: 0)
    model = torch.nn.Linear(2, 2)
    assert isinstance(Usual().method(model, model, device=CPU), distil)
    assert isinstance(Usual().method(None, {"weight": torch.ones(2, 2)}, device=CPU), distil)
