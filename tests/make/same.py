"""Checkpoints that are alike."""

import torch

from peft_posthoc.checkpoints.checkpoint import Header


def same(checkpoint, tensors):
    assert set(checkpoint.headers) == set(tensors)
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert checkpoint.headers[name] == Header(tuple(tensor.shape), tensor.dtype)
        assert checkpoint.headers[name].bytes == tensor.nbytes
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name
        assert not read.requires_grad
    return True
