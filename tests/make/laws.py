"""What holds for every checkpoint, whatever it is read from: a function for each law, of how it is opened.

In a file of its own, as the hub's client has to be another process.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import torch

from peft_posthoc import CheckpointError
from peft_posthoc.checkpoints.checkpoint import Checkpoint

VOCABULARY = 96


def headers_are_what_is_read(checkpoint):
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.headers
    for name, header in checkpoint.headers.items():
        tensor = checkpoint.read(name)
        assert (tuple(tensor.shape), tensor.dtype) == header, name
        assert header.bytes == tensor.nbytes
        assert not tensor.requires_grad


def a_tied_tensor_is_there_once(checkpoint):
    assert sum(header.shape[:1] == (VOCABULARY,) for header in checkpoint.headers.values()) == 1


def identity_is_plain_json(checkpoint):
    assert json.loads(json.dumps(checkpoint.identity)) == checkpoint.identity


def order_and_threads_do_not_matter(checkpoint):
    names = list(checkpoint.headers)
    first = {name: checkpoint.read(name).clone() for name in names}
    with ThreadPoolExecutor(2) as pool:
        again = dict(zip(names[::-1], pool.map(checkpoint.read, names[::-1]), strict=True))
    assert all(torch.equal(again[name], first[name]) for name in names)


def a_missing_name_is_told_in_one_line(checkpoint):
    try:
        checkpoint.read("no.such.weight")
    except (KeyError, CheckpointError) as error:
        said = str(error)
    assert "no.such.weight" in said
    assert "\n" not in said


LAWS = [
    headers_are_what_is_read,
    a_tied_tensor_is_there_once,
    identity_is_plain_json,
    order_and_threads_do_not_matter,
    a_missing_name_is_told_in_one_line,
]
