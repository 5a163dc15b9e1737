"""Where weights come from: a folder, a file, a hub id, base + adapter, a module or a state dict, as named tensors.

A source is any object with the attributes of `Checkpoint`; `open_checkpoint` is the one place that chooses among them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from peft_posthoc.errors import CheckpointError

Source: TypeAlias = "str | PathLike[str] | nn.Module | Mapping[str, Tensor] | Checkpoint"


class Header(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size on disk, in bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@runtime_checkable
class Checkpoint(Protocol):
    """Named tensors, read one at a time."""

    @property
    def label(self) -> str:
        """What the user called it: a path, a hub id, or the class of a live object."""

    @property
    def revision(self) -> str | None:
        """The resolved commit of a hub id; None elsewhere."""

    @property
    def folder(self) -> Path | None:
        """A folder that transformers can load it from, if there is one."""

    @property
    def identity(self) -> Any:
        """Plain JSON values that change when the tensors do; None for tensors in memory."""

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The model's configuration (`config.json`), if there is one."""

    @property
    def module(self) -> nn.Module | None:
        """The live module, if it is one."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Shape and dtype of every tensor, without reading one."""

    @property
    def sequential(self) -> bool:
        """Whether each tensor can be read once only, in the order of `headers`: they are made as they are read."""

    def read(self, name: str) -> Tensor:
        """The tensor of that name, in its own dtype. It may share memory with its source and must not be changed."""


def once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those that are another one under a second name: tied weights, as safetensors stores them."""
    seen: set[tuple[object, ...]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.is_meta or not tensor.numel() or identity not in seen:
            kept[name] = tensor
        seen.add(identity)
    return kept


class InMemory:
    """Tensors that are already there: a state dict or a module's."""

    revision: str | None = None
    folder: Path | None = None
    identity: Any = None
    sequential = False

    def __init__(self, tensors: Mapping[str, Tensor], *, label: str, module: nn.Module | None = None) -> None:
        self.label = label
        self.module = module
        self._tensors = once({name: tensor.detach() for name, tensor in tensors.items()})
        self.headers = {name: Header(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}
        to_dict = getattr(getattr(module, "config", None), "to_dict", None)
        self.config: Mapping[str, Any] | None = to_dict() if callable(to_dict) else None

    def read(self, name: str) -> Tensor:
        """The tensor itself, not a copy.

        Raises:
            CheckpointError: It has no values: it lies on the meta device.
        """
        tensor = self._tensors[name]
        if tensor.is_meta:
            raise CheckpointError(
                f"`{name}` of the {self.label} is on the meta device and has no values. Load the whole model into "
                "memory, or give its folder."
            )
        return tensor


# `torch.compile(module)` is a module of its own that holds the other one under this name.
_COMPILED = "_orig_mod"
# The same for FSDP and for activation checkpointing.
_WRAPPED = (_COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# What all names begin with where a wrapper's state dict was saved in place of the model's: (D)DP's, PEFT's.
_OUTER = ("module.", "base_model.model.")


def _unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the names that its model has without `torch.compile` and other wrappers.

    Raises:
        CheckpointError: It holds a tensor under both names.
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
    """A checkpoint under other names, of which `names` gives the old ones, or without some of its tensors.

    It has no folder: transformers would look for the new names in files that have the old ones.
    """
    from peft_posthoc.view import View, same

    module = _uncompiled(checkpoint.module) if checkpoint.module is not None else None
    pieces = {new: same(checkpoint, old) for new, old in names.items()}
    return View(checkpoint, pieces, module=module)


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module without `torch.compile` at any depth: itself if there is none, else a copy that shares its tensors."""
    inner = module._modules.get(_COMPILED)
    module = module if inner is None else inner
    children = {name: None if child is None else _uncompiled(child) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    plain = copy.copy(module)
    plain._modules = children
    return plain


def _without_second_names(checkpoint: Checkpoint, other: Checkpoint) -> Checkpoint:
    """The checkpoint without the tied weights that it stores again under names that the other one lacks.

    torch.distributed.checkpoint writes a tied weight under each of its names, `save_pretrained` under one. Such a name
    goes if its matrix is, bit for bit, the only other one of that shape and type that both checkpoints have.
    """
    headers = checkpoint.headers

    def is_second(name: str) -> bool:
        same = [twin for twin in headers if headers[twin] == headers[name] and twin in other.headers]
        return len(same) == 1 and torch.equal(checkpoint.read(name), checkpoint.read(same[0]))

    seconds = {n for n in headers if n not in other.headers and len(headers[n].shape) > 1 and is_second(n)}
    return _renamed(checkpoint, {n: n for n in headers if n not in seconds}) if seconds else checkpoint


def _of_module(module: nn.Module) -> InMemory:
    if hasattr(module, "peft_config"):
        raise CheckpointError(
            f"The {type(module).__name__} already carries a PEFT adapter. Call `merge_and_unload()` or `unload()` "
            "on it and give the plain model."
        )
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    kept = module.state_dict(keep_vars=True)
    tensors |= {name: buffer for name, buffer in module.named_buffers() if name in kept}
    name = getattr(getattr(module, "config", None), "_name_or_path", None)
    return InMemory(tensors, label=name or type(module).__name__, module=module)


def open_pair(
    base: Source, tuned: Source, *, base_revision: str | None = None, tuned_revision: str | None = None
) -> tuple[Checkpoint, Checkpoint]:
    """Open both sides of a delta.

    Raises:
        CheckpointError: One of them cannot be read.
    """
    from peft_posthoc.distcp import Distcp

    before = open_checkpoint(base, revision=base_revision, role="base")
    after = open_checkpoint(tuned, revision=tuned_revision, role="tuned")
    return before, _without_second_names(after, before) if isinstance(after, Distcp) else after


def _of_folder(path: Path, *, label: str, commit: str | None = None) -> Checkpoint:
    """What a folder holds: whole weights, an adapter, or what a training run left of each process."""
    from peft_posthoc import adapted, distcp, folder, zero

    if adapted.is_adapter(path):
        return adapted.on_its_base(path, label=label, revision=commit)
    if (shards := distcp.find_shards(path)) is not None:
        return distcp.Distcp(path, shards, label=label)
    if (partitions := zero.find_partitions(path)) is not None:
        return zero.Zero(path, partitions, label=label)
    return folder.Folder(path, label=label, revision=commit)


def open_checkpoint(source: Source, *, revision: str | None = None, role: str = "source") -> Checkpoint:
    """Open a folder, a file, a hub id, a module, a state dict or another checkpoint for reading.

    Args:
        source: A local folder, be it with the shards of torch.distributed.checkpoint or DeepSpeed's ZeRO; a single file
            of weights; a hub id (`org/name`), whose needed files are fetched; a LoRA adapter's folder or hub id, whose
            base it names itself; `BASE+ADAPTER`; a `torch.nn.Module`; a state dict; or anything that already is a
            `Checkpoint`.
        revision: Branch, tag or commit of a hub id.
        role: What messages call it: `base` or `tuned`.

    Raises:
        CheckpointError: There is no such folder or repository, or its files cannot be read as plain tensors.
        ValueError: `revision` is given for something that has none.
    """
    checkpoint: Checkpoint
    if isinstance(source, nn.DataParallel | nn.parallel.DistributedDataParallel):
        source = source.module
    if isinstance(source, nn.Module):
        checkpoint = _of_module(source)
    elif isinstance(source, Mapping):
        strangers = [str(name) for name, value in source.items() if not isinstance(value, Tensor)]
        if strangers:
            raise CheckpointError(f"The {role} state dict holds values that are no tensors: {', '.join(strangers)}.")
        checkpoint = InMemory(source, label="state dict")
    elif isinstance(source, str | PathLike):
        from peft_posthoc import adapted, folder, hub

        path = Path(source)
        if path.is_dir():
            checkpoint = _of_folder(path, label=str(source))
        elif path.is_file() and path.suffix in folder.SUFFIXES:
            checkpoint = folder.File(path, label=str(source))
        elif hub.is_repo_id(str(source)) and not path.exists():
            found = hub.find(str(source), revision=revision, role=role)
            headers = found.headers()
            if headers is None:
                checkpoint = _of_folder(found.get(), label=str(source), commit=found.commit)
            else:
                checkpoint = hub.OnHub(found, headers)
            revision = None
        elif not path.exists() and (sides := adapted.sides(str(source))):
            checkpoint = adapted.adapted(*sides, role=role)
        else:
            kinds = ", ".join(folder.SUFFIXES)
            what = "is no regular file" if path.exists() else "does not exist"
            what = f"is a file of another kind than {kinds}" if path.is_file() else what
            raise CheckpointError(
                f"The {role} `{source}` {what}. Give a model folder, a file of weights, or a hub id such as "
                "`org/name`; with an adapter on it, BASE+ADAPTER."
            )
    elif isinstance(source, Checkpoint):
        checkpoint = source
    else:
        raise TypeError(
            f"The {role} must be a folder, a file, a hub id, a module or a state dict. Got {type(source).__name__}."
        )
    if revision is not None:
        raise ValueError(f"A revision ({revision!r}) belongs to a hub id; the {role} `{checkpoint.label}` is none.")
    if not checkpoint.headers:
        raise CheckpointError(f"The {role} `{checkpoint.label}` holds no tensors.")
    return _unwrapped(checkpoint)
