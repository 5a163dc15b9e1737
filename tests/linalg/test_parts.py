"""A large delta is shared out among idle threads, and its factors are the same whoever was idle."""

import threading

import pytest
import torch

from peft_posthoc.compute.workers import Workers
from peft_posthoc.extraction.delta import Pair, difference
from peft_posthoc.linalg import dense, norms
from peft_posthoc.linalg.svd import truncated_svd
from tests.make.spectra import power, with_spectrum


@pytest.fixture
def large(monkeypatch):
    """A delta of 15 parts, tall; the constants make it large."""
    monkeypatch.setattr(dense, "_PART", 2**14)
    monkeypatch.setattr(norms, "_CHUNK", 2**8)
    return with_spectrum(640, 400, power(400), dtype=torch.float32)


def in_threads(count, work):
    with Workers(count, torch_threads=1) as workers:
        (found,) = workers.map(lambda _: work(), [0])
    return found


@pytest.mark.parametrize("turned", [False, True])
def test_its_factors_are_the_same_bits_however_many_threads_help(turned, large):
    delta = large.mT if turned else large
    one, two, four = (in_threads(count, lambda: truncated_svd(delta, 40)) for count in (1, 2, 4))
    for other in (two, four):
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.b, other.b)
    assert one.s.tolist() == pytest.approx(power(400)[:40].tolist(), rel=1e-3)


def test_helpers_take_parts_of_its_products(large, monkeypatch):
    used, together, mm = set(), threading.Barrier(2), torch.mm

    def product(*args, **how):
        if len(used) < 2 and threading.current_thread() not in used:
            used.add(threading.current_thread())
            together.wait(60)
        return mm(*args, **how)

    monkeypatch.setattr(torch, "mm", product)
    in_threads(2, lambda: truncated_svd(large, 40))
    assert len(used) == 2


def test_its_difference_and_norms_are_the_same_bits_too(large):
    pair = Pair("weight", torch.randn(large.shape).bfloat16(), large.bfloat16())
    one, four = (in_threads(count, lambda: difference(pair)) for count in (1, 4))
    assert torch.equal(one.values, four.values)
    assert one[1:] == four[1:]
    assert torch.equal(one.values, pair.tuned.float() - pair.base.float())
