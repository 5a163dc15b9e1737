"""How long the work takes, told before it: by a clock of our own."""

import itertools

import pytest
import torch

from peft_posthoc import extract, preflight, preflight_many
from peft_posthoc.extraction import estimate
from peft_posthoc.extraction.prepare import prepare
from peft_posthoc.extraction.request import Request
from peft_posthoc.linalg.svd import cost
from peft_posthoc.text import duration


@pytest.fixture
def clock(monkeypatch):
    """What is measured takes two seconds where the delta is of low rank, and five where it is noise."""
    ticks = itertools.cycle([0.0, 2.0, 10.0, 15.0])
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(estimate, "outcome_of", lambda *_, **__: None)


def test_it_is_what_a_weight_takes_times_how_much_work_there_is(clock, llama_pair):
    torch.set_num_threads(2)
    prepared = prepare(*llama_pair, Request.of(4))
    # The costliest are those of the MLP, small enough to be measured as they are.
    share = sum(estimate.costs(prepared).values()) / (1e3 * 48 * 32 + cost(48, 32, 4)) / 2
    assert estimate.seconds(prepared) == pytest.approx((2 * share, 5 * share))
    assert preflight(*llama_pair, 4).seconds == pytest.approx((2 * share, 5 * share))
    assert f"Time: {duration(2 * share)} to {duration(5 * share)}" in preflight(*llama_pair, 4).table()
    assert torch.get_num_threads() == 2


def test_a_fleet_takes_as_long_as_its_fine_tunes_together(clock, llama_pair, tmp_path):
    one = preflight(*llama_pair, 4).seconds
    planned = preflight_many(llama_pair[0], {"a": llama_pair[1], "b": llama_pair[1]}, 4, out=tmp_path / "all")
    assert planned.seconds == pytest.approx((2 * one[0], 2 * one[1]))


@pytest.mark.parametrize("options", [{"rank": "auto"}, {"rank": 0.9}, {"rank": 4, "exact": True, "form": "peft"}])
def test_any_rule_can_be_measured_for(options, llama_pair):
    least, most = preflight(*llama_pair, **options).seconds
    assert 0 < least <= most
    assert extract(*llama_pair, **options).report.totals.extracted


@pytest.mark.parametrize(("seconds", "told"), [(0.01, "1 s"), (100, "100 s"), (600, "10 min"), (3600 * 5, "5.0 h")])
def test_times_are_for_people(seconds, told):
    assert duration(seconds) == told
