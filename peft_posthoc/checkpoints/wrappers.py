"""The names that wrappers of a model put before its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.view import View, same
from peft_posthoc.errors import CheckpointError

# `torch.compile(module)` is a module of its own that holds the other one under this name.
_COMPILED = "_orig_mod"
# The same for FSDP and for activation checkpointing.
_WRAPPED = (_COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# What all names begin with where a wrapper's state dict was saved in place of the model's: (D)DP's, PEFT's.
_OUTER = ("module.", "base_model.model.")


def unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the names that its model has without `torch.compile` and other wrappers.

    Raises:
        CheckpointError: The checkpoint holds one tensor both with and without such a name.
    """
    names: dict[str, str] = {}
    # A live model has the names it has.
    outer = () if checkpoint.module is not None else _OUTER
    begin = next((begin for begin in outer if all(name.startswith(begin) for name in checkpoint.headers)), "")
    for name in checkpoint.headers:
        plain = ".".join(part for part in name.removeprefix(begin).split(".") if part not in _WRAPPED)
        if plain in names:
            raise CheckpointError(
                f"`{checkpoint.label}` holds both `{names[plain]}` and `{name}`: one weight, with and without "
                "`torch.compile`. Save the model again, without it."
            )
        names[plain] = name
    return checkpoint if names.keys() == checkpoint.headers.keys() else _renamed(checkpoint, names)


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """A checkpoint under other names, of which `names` gives the old ones.

    It has no folder: transformers would look for the new names in files that have the old ones.
    """
    module = uncompiled(checkpoint.module) if checkpoint.module is not None else None
    pieces = {new: same(checkpoint, old) for new, old in names.items()}
    return View(checkpoint, pieces, module=module)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module without `torch.compile` at any depth: itself if there is none, else a copy that shares its tensors."""
    inner = module._modules.get(_COMPILED)
    module = module if inner is None else inner
    children = {name: None if child is None else uncompiled(child) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    plain = copy.copy(module)
    plain._modules = children
    return plain


def without_second_names(checkpoint: Checkpoint, other: Checkpoint) -> Checkpoint:
    """The checkpoint without the tied weights that it stores again under names that the other one lacks.

    torch.distributed.checkpoint writes a tied weight under each of its names, and so do programs that copy tensors;
    `save_pretrained` does under one. Such a name goes if its matrix is, bit for bit, the only other one of that shape
    and type that both checkpoints have.
    """
    headers = checkpoint.headers
    # Of other columns, too, they would be no states of one model: nothing is read, or fetched, of those.
    shared = [n for n in headers if n in other.headers and other.headers[n].shape[1:] == headers[n].shape[1:]]

    def is_second(name: str) -> bool:
        alike = [twin for twin in shared if headers[twin] == headers[name]]
        return len(alike) == 1 and torch.equal(checkpoint.read(name), checkpoint.read(alike[0]))

    if checkpoint.sequential:
        return checkpoint
    seconds = {n for n in headers if n not in other.headers and len(headers[n].shape) > 1 and is_second(n)}
    pieces = {name: same(checkpoint, name) for name in headers if name not in seconds}
    return View(checkpoint, pieces, loadable=True, module=checkpoint.module) if seconds else checkpoint
