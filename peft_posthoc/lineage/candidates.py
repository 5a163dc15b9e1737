"""What a fine-tune may come from: what the user gives, what it names itself, and what is in the hub's local cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import exists, isdir
from typing import Any

from peft_posthoc.adapters.named_base import bases_of
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.hub import bases_in_card, find, is_repo_id
from peft_posthoc.checkpoints.hub_cache import cached, cached_models
from peft_posthoc.checkpoints.model_files import config_of
from peft_posthoc.errors import CheckpointError, PosthocError
from peft_posthoc.sources import Source, open_checkpoint

# A card that names another one that names the first is no tree; nor is one of so many levels.
_MOST_NAMED = 16


@dataclass
class Found:
    """A candidate, opened or the error that it was met with."""

    name: str
    source: Source
    checkpoint: Checkpoint | Exception
    unasked: bool = False
    """Whether neither the user nor any model named it."""

    @classmethod
    def of(cls, source: Source, name: str | None = None, *, unasked: bool = False) -> Found:
        """Open a candidate."""
        try:
            checkpoint: Checkpoint | Exception = opened(source, "candidate")
        except Exception as error:
            checkpoint = error
        return cls(name or called(source, checkpoint), source, checkpoint, unasked)

    def read(self) -> Checkpoint:
        """The checkpoint.

        Raises:
            Exception: It could not be opened.
        """
        if isinstance(self.checkpoint, Exception):
            raise self.checkpoint
        return self.checkpoint


def called(source: Source, checkpoint: Checkpoint | Exception) -> str:
    """What the user calls a model."""
    if isinstance(source, str | os.PathLike):
        return str(source).rstrip("/") or str(source)
    return checkpoint.label if isinstance(checkpoint, Checkpoint) else type(source).__name__


def given(candidates: Sequence[Source]) -> list[Found]:
    """What the user gives."""
    return [Found.of(source) for source in candidates]


def named_by(source: Source, checkpoint: Checkpoint) -> list[str]:
    """What a model says that it was made from; of a hub id its card there, too."""
    told = [one.name for one in bases_of(checkpoint)]
    on_hub = isinstance(source, str) and is_repo_id(source) and not exists(source)
    return told or (bases_in_card(str(source)) if on_hub else [])


def nearby(source: Source, tuned: Checkpoint) -> list[Found]:
    """What a fine-tune names as its base, what that names in turn, and the models of its kind in the local cache.

    Args:
        source: What the user calls it.
        tuned: As it was opened.
    """
    found: dict[str, Found] = {}
    named = named_by(source, tuned)
    while named and len(found) < _MOST_NAMED:
        name = named.pop(0)
        # A configuration may name a place on another machine.
        if name in found or not (isdir(name) or is_repo_id(name)):
            continue
        found[name] = one = Found.of(name)
        if isinstance(one.checkpoint, Checkpoint):
            named += named_by(name, one.checkpoint)
    kind = _kind(tuned.config)
    for repo_id, folder in cached_models().items():
        if repo_id not in found and (kind is None or _kind(config_of(folder)) in (None, kind)):
            found[repo_id] = Found.of(folder, repo_id, unasked=True)
    return list(found.values())


def _kind(config: Mapping[str, Any] | None) -> Any:
    """What transformers or diffusers know the architecture by."""
    return (config or {}).get("model_type") or (config or {}).get("_class_name")


def opened(source: Source, role: str) -> Checkpoint:
    """A checkpoint of which no more than what is read is fetched: of a hub id, what the local cache has, or parts.

    Args:
        source: As `open_checkpoint` takes it.
        role: What messages call it.

    Raises:
        CheckpointError: It cannot be read.
    """
    if not (isinstance(source, str) and is_repo_id(source)) or exists(source):
        return open_checkpoint(source, role=role)
    if (folder := cached(source)) is not None:
        # Where not all of its files are there, the others are the hub's to tell of.
        with contextlib.suppress(PosthocError):
            return open_checkpoint(folder, role=role)
    there = find(source, role=role)
    if there.missing and not there.streams:
        raise CheckpointError(f"`{source}` is not in the local cache. Download it, or give its folder.")
    return open_checkpoint(source, role=role, stream=True)
