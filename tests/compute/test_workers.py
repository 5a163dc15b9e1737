"""Threads that work ahead: no more at a time than has room, whatever happens."""

import threading

import pytest
import torch

from peft_posthoc.compute.workers import Workers


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
