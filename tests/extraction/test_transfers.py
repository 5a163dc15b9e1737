"""What goes to a GPU and back for one weight, and how often it is waited for: nothing of it for each chunk."""

from dataclasses import astuple

import pytest
import torch

from peft_posthoc import extract, verify
from peft_posthoc.extraction.delta import Pair
from peft_posthoc.extraction.fate import Factored, Whole
from peft_posthoc.extraction.reasons import LeftOut, Reason
from peft_posthoc.extraction.work import outcome_of
from peft_posthoc.linalg import norms
from peft_posthoc.models.kinds import LINEAR
from peft_posthoc.models.layout import Place
from peft_posthoc.ranks.rules import above_noise, fixed
from tests.make.pretended_gpu import GPU, PretendedGPU

M, N = 512, 400
VALUES = M * N
PLACES = (Place("module", LINEAR, "layer"),)
FATES = {
    "factored": Factored(PLACES, fixed(8)),
    "factored by its noise": Factored(PLACES, above_noise()),
    "whole": Whole(("module",), ("module.weight",), as_bias=False),
    "left out": LeftOut(Reason.NOT_CHOSEN),
}


def a_pair():
    base = torch.randn(M, N).bfloat16()
    low_rank = torch.randn(M, 8) @ torch.randn(8, N)
    return Pair("module.weight", base, (base.float() + 0.1 * low_rank + 0.01 * torch.randn(M, N)).bfloat16())


def on_gpu(fate, monkeypatch, *, chunk):
    monkeypatch.setattr(norms, "_CHUNK_OF_GPU", chunk)
    torch.manual_seed(0)
    with PretendedGPU() as gpu:
        outcome = outcome_of(a_pair(), fate, device=GPU)
    return outcome, gpu


@pytest.mark.parametrize("what", FATES)
def test_a_weight_goes_there_in_two_copies_and_is_not_waited_for_at_each_chunk(what, monkeypatch):
    found, gpu = on_gpu(FATES[what], monkeypatch, chunk=VALUES)
    same, in_chunks = on_gpu(FATES[what], monkeypatch, chunk=VALUES // 50)
    assert gpu.there.count(VALUES) == in_chunks.there.count(VALUES) == 2
    assert in_chunks.waits == gpu.waits <= (50 if "factored" in what else 3)
    assert len(in_chunks.there) == len(gpu.there)
    assert len(in_chunks.back) == len(gpu.back)
    assert same.base_norm == pytest.approx(found.base_norm, rel=1e-12)


@pytest.mark.parametrize("what", FATES)
def test_what_comes_back_is_what_the_cpu_makes(what, monkeypatch):
    # In chunks of one size, and a delta that is one panel: the same bits.
    found, _ = on_gpu(FATES[what], monkeypatch, chunk=norms._CHUNK)
    torch.manual_seed(0)
    expected = outcome_of(a_pair(), FATES[what])
    assert found.base_norm == expected.base_norm
    if what.startswith("factored"):
        assert torch.equal(found.factors.a, expected.factors.a)
        assert torch.equal(found.factors.b, expected.factors.b)
        assert found.noise == expected.noise
    if what == "whole":
        assert torch.equal(found.value, expected.value)


def test_a_live_model_there_is_worked_on_here_when_it_has_come():
    torch.manual_seed(0)
    pair = a_pair()
    expected = outcome_of(pair, FATES["factored"])
    with PretendedGPU() as gpu:
        far = pair._replace(base=pair.base.to(GPU), tuned=pair.tuned.to(GPU))
        found = outcome_of(far, FATES["factored"], device=torch.device("cpu"))
    assert gpu.back == [VALUES, VALUES]
    assert torch.equal(found.factors.a, expected.factors.a)


def test_an_adapter_is_verified_there_as_on_the_cpu(llama_pair, tmp_path):
    adapter = extract(*llama_pair, 4).save(tmp_path / "adapter")
    expected = verify(adapter, *llama_pair, outputs=False)
    with PretendedGPU() as gpu:
        found = verify(adapter, *llama_pair, outputs=False, device="cuda:0")
    assert gpu.there
    assert found.cosine == pytest.approx(expected.cosine, rel=1e-6)
    assert [row.weight for row in found.rows] == [row.weight for row in expected.rows]
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert astuple(row)[1:] == pytest.approx(astuple(other)[1:], rel=1e-5, abs=1e-6), row.weight
