"""Threads that work ahead: no more at a time than has room, whatever happens."""

import threading

import pytest
import torch

from peft_posthoc.compute.workers import Workers, spread


class Seen:
    """Work that counts how much of it runs at a time."""

    def __init__(self):
        self.running, self.most, self.lock = 0, 0, threading.Lock()

    def __call__(self, item):
        with self.lock:
            self.running += item
            self.most = max(self.most, self.running)
        with self.lock:
            self.running -= item
        return -item


@pytest.mark.parametrize(("threads", "room"), [(1, 0), (3, 5), (3, 1), (4, 100)])
def test_every_item_is_worked_on_once_and_never_more_than_has_room(threads, room):
    items, seen = [1, 5, 2, 9, 3, 1, 1, 4], Seen()
    with Workers(threads, room=room) as workers:
        assert sorted(workers.map(seen, items, size=lambda item: item)) == sorted(-item for item in items)
    assert seen.most <= max(room, 9)


def test_one_thread_keeps_the_order_and_is_never_far_ahead():
    taken = []
    with Workers(waiting=1) as workers:
        for done in workers.map(lambda item: item, (taken.append(i) or i for i in range(9))):
            assert taken == list(range(min(done + 3, 9)))  # One is being done, one is waiting to be.


def test_a_fault_comes_out_and_no_thread_stays():
    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError), Workers(2) as workers:
        list(workers.map(lambda item: 1 / item, [1, 2, 0, 3]))
    assert set(threading.enumerate()) <= before


def test_threads_of_pytorch_are_as_before_afterwards():
    before = torch.get_num_threads()
    with Workers(2, torch_threads=1) as workers:
        assert list(workers.map(lambda _: torch.get_num_threads(), [0])) == [1]
    assert torch.get_num_threads() == before


def test_idle_threads_help_with_what_is_one_item_and_the_results_are_in_order():
    together = threading.Barrier(3)

    def part(x):
        if x < 3:
            together.wait(60)  # Three threads are at it, or this raises.
        return x * x

    with Workers(3) as workers:
        assert list(workers.map(lambda count: spread(part, range(count)), [20])) == [[x * x for x in range(20)]]


def test_threads_that_all_have_an_item_share_it_out_all_the_same():
    with Workers(2) as workers:
        found = list(workers.map(lambda x: spread(lambda y: (x, y), range(5)), range(40)))
    assert sorted(found) == [[(x, y) for y in range(5)] for x in range(40)]


def test_what_goes_wrong_in_a_helper_goes_wrong_in_the_item():
    together = threading.Barrier(2)

    def part(x):
        together.wait(60)
        if threading.current_thread() is not owner:
            raise ValueError("a helper's")

    def item(_):
        nonlocal owner
        owner = threading.current_thread()
        return spread(part, range(2))

    owner = None
    with Workers(2) as workers, pytest.raises(ValueError, match="a helper's"):
        list(workers.map(item, [0]))
