"""The loop over all weights: what it leaves behind when it does not come to its end."""

import json
import threading

import pytest
import torch

from peft_posthoc import CheckpointError, NothingToCarryError, extract, open_checkpoint
from peft_posthoc.checkpoints.memory import InMemory
from peft_posthoc.extraction.read import read_pairs
from peft_posthoc.sources import open_pair


def threads():
    """Those that Python waits for before it ends; tqdm has one that it does not."""
    return {thread for thread in threading.enumerate() if not thread.daemon}


def worse(base, name):
    """A fine-tune of which one weight holds a NaN."""
    tuned = {key: value + 0.1 for key, value in base.items()}
    tuned[name] = torch.full_like(tuned[name], torch.nan)
    return tuned


@pytest.mark.parametrize("index", [0, 3, 6])
def test_no_thread_outlives_an_error_that_is_still_held(index):
    base = {f"layers.{i}.proj.weight": torch.randn(8, 8) for i in range(7)}
    before = threads()
    with pytest.raises(CheckpointError) as error:
        extract(base, worse(base, f"layers.{index}.proj.weight"), 2)
    # The traceback keeps every frame of it alive: threads that only the garbage collector would end are still there.
    assert error.tb is not None
    assert threads() <= before


def test_the_reading_thread_ends_with_its_block():
    base = {f"layers.{i}.proj.weight": torch.randn(8, 8) for i in range(7)}
    before = threads()
    with read_pairs(*open_pair(base, base), base) as pairs:
        first = next(pairs)
        assert len(threads() - before) == 1
    assert torch.equal(first.base, base[first.name])
    assert threads() <= before


# Ranks by weight.


def stack(layers=4, side=12):
    return {f"layers.{i}.proj.weight": torch.randn(side, side) for i in range(layers)}


def test_ranks_by_weight_carry_those_that_have_one():
    base, tuned = stack(), stack()
    first, second, third, fourth = base
    adapter = extract(base, tuned, {first: 3, third: 0.8})
    assert adapter.layers.keys() == {first, third}
    assert len(adapter.layers[first].factors.s) == 3
    assert torch.equal(adapter.layers[third].factors.a, extract(base, tuned, 0.8).layers[third].factors.a)
    assert {name: row.reason for name, row in adapter.skipped.items()} == dict.fromkeys(
        (second, fourth), "no rank is given for it"
    )
    assert adapter.provenance["options"]["rule"] == {first: "fixed(rank=3)", third: "keep_energy(share=0.8)"}
    assert extract(base, tuned, dict.fromkeys(base, 3)).provenance["options"]["rule"] == "fixed(rank=3)"


def test_a_rank_for_a_weight_that_cannot_be_carried_is_refused():
    base = stack() | {"norm.weight": torch.ones(12)}
    with pytest.raises(ValueError, match=r"for `norm\.weight`, which cannot be carried: norm or other vector"):
        extract(base, {name: value + 1 for name, value in base.items()}, {"norm.weight": 1})
    with pytest.raises(ValueError, match=r"for `other`, which cannot be carried: neither checkpoint has it"):
        extract(base, {name: value + 1 for name, value in base.items()}, {"other": 1})
    with pytest.raises(NothingToCarryError, match="no rank is given"):
        extract(base, {name: value + 1 for name, value in base.items()}, {})


# A source that is made as it is read.


class Once(InMemory):
    """Tensors that can be had once only, in the order of their headers."""

    sequential = True

    def __init__(self, tensors):
        super().__init__(tensors, label="once")
        self.order = list(self.headers)

    def read(self, name):
        assert name == self.order.pop(0)
        return super().read(name)


def test_a_sequential_source_is_read_in_its_own_order():
    # The costliest come first otherwise.
    base = {f"layers.{i}.proj.weight": torch.randn(side, side) for i, side in enumerate((8, 32, 16, 24))}
    tuned = {name: base[name] + torch.randn_like(base[name]) for name in reversed(base)}
    once = Once(tuned)
    adapter = extract(base, once, 4)
    assert not once.order
    wanted = extract(base, tuned, 4)
    assert all(torch.equal(adapter.layers[n].factors.b, layer.factors.b) for n, layer in wanted.layers.items())


def test_a_rule_knows_the_same_of_a_delta_while_it_is_factored_and_afterwards():
    base, tuned = stack(layers=2), stack(layers=2)
    norms = {}

    def rule(spectrum):
        norms.setdefault(spectrum.shape, set()).add(spectrum.base_norm)
        return 2

    adapter = extract(base, tuned, rule)
    adapter.at(rule)
    assert norms == {(12, 12): {layer.base_norm for layer in adapter.layers.values()}}


def test_what_is_infinite_in_both_alike_is_unchanged_and_no_obstacle():
    """Gemma 4's sound has bounds that are infinite until they are measured."""
    bounds = torch.tensor([float("inf"), float("-inf"), float("nan"), 3.0])
    base = {"a.weight": torch.randn(6, 5), "bounds": bounds}
    tuned = {"a.weight": torch.randn(6, 5), "bounds": bounds.clone()}
    report = extract(base, tuned, 5).report
    row = next(row for row in report.rows if row.weight == "bounds")
    assert (row.status, row.base_norm) == ("unchanged", 3.0)
    assert report.totals.energy_of_all == pytest.approx(1)
    json.dumps(report.to_dict(), allow_nan=False)
    with pytest.raises(CheckpointError, match="NaN or infinity in `bounds`"):
        extract(base, tuned | {"bounds": bounds.flip(0)}, 5)


def test_what_is_read_ahead_takes_one_core_and_the_rest_is_as_before(llama_pair):
    base, tuned = llama_pair
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    used = set()
    try:
        source = open_checkpoint(base)
        read = source.read
        source.read = lambda name: used.add(torch.get_num_threads()) or read(name)
        extract(source, tuned, 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert used == {1}
