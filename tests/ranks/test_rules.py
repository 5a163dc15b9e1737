import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_posthoc.linalg.spectrum import Spectrum
from peft_posthoc.ranks.rules import as_rule, describe, fixed, keep_energy
from tests.make.spectrum import whole


def test_fixed_keeps_its_rank_or_all_of_a_smaller_delta():
    assert fixed(3)(whole([4.0, 3.0, 2.0, 1.0])) == 3
    assert fixed(9)(whole([4.0, 3.0, 2.0, 1.0])) == 4


def test_fixed_asks_for_more_than_is_known():
    assert fixed(3)(Spectrum(torch.ones(2).double(), 10.0, (8, 9))) == 3


@pytest.mark.parametrize("rank", [0, -1, True])
def test_fixed_refuses_what_is_no_rank(rank):
    with pytest.raises(ValueError, match=r"A rank must be a whole number of at least 1\. Got "):
        fixed(rank)


@pytest.mark.parametrize(("share", "rank"), [(1e-9, 1), (0.79, 1), (0.8, 1), (0.81, 2), (0.95, 2), (0.96, 3), (1.0, 3)])
def test_energy_keeps_the_fewest_triplets_that_reach_the_share(share, rank):
    assert keep_energy(share)(whole([4.0, 3**0.5, 1.0])) == rank


@given(k=st.integers(1, 60), seed=st.integers(0, 2**31), share=st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999, 1.0]))
def test_energy_reaches_its_share_and_one_triplet_less_does_not(k, seed, share):
    spectrum = whole(torch.rand(k, generator=torch.Generator().manual_seed(seed)).sort(descending=True).values.tolist())
    rank = keep_energy(share)(spectrum)
    held = spectrum.s.square().cumsum(0) / spectrum.energy
    assert held[rank - 1] >= share - 1e-9
    assert rank == 1 or held[rank - 2] < share


def test_energy_asks_for_more_than_is_known_until_it_is_reached():
    known = Spectrum(torch.tensor([2.0, 1.0]).double(), 10.0, (8, 9))
    assert keep_energy(0.5)(known) == 2
    assert keep_energy(0.6)(known) == 3


def test_energy_is_a_share_of_the_true_total_not_of_what_is_known():
    known = Spectrum(torch.tensor([2.0, 1.0]).double(), 5.0, (8, 9))
    assert keep_energy(0.75)(known) == 1
    assert keep_energy(0.75)(known._replace(energy=50.0)) == 3


def test_energy_never_asks_for_more_than_there_is():
    assert keep_energy(1.0)(Spectrum(torch.tensor([1.0, 1.0]).double(), 2.1, (2, 9))) == 2


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, 90.0, float("nan")])
def test_energy_refuses_what_is_no_share(share):
    with pytest.raises(ValueError, match=r"An energy share must lie above 0 and be at most 1\. Got "):
        keep_energy(share)


def test_a_number_is_a_rank_or_a_share():
    assert as_rule(8) == fixed(8)
    assert as_rule(0.9) == keep_energy(0.9)
    assert as_rule(1.0) == keep_energy(1.0)
    rule = keep_energy(0.5)
    assert as_rule(rule) is rule


def test_a_rule_is_described_in_the_same_words_in_every_process():
    assert describe(fixed(8)) == "fixed(rank=8)"
    assert describe(keep_energy(0.9)) == "keep_energy(share=0.9)"
    assert describe(whole).endswith("whole")
