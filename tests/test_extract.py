"""The loop over all weights: what it leaves behind when it does not come to its end."""

import threading

import pytest
import torch

from peft_posthoc import CheckpointError, extract
from peft_posthoc.checkpoint import open_pair
from peft_posthoc.extract import read_pairs


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
