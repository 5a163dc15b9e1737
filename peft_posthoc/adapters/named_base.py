"""Names of bases: what a model or an adapter says that it was made from, and when two names are of one model."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Unlike Path's own they take any text, a configuration's too: not a name of 1,000 characters, nor a zero in it.
from os.path import exists, isdir
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, place_of
from peft_posthoc.checkpoints.folder import Folder
from peft_posthoc.checkpoints.hub import bases_in_card, is_repo_id
from peft_posthoc.checkpoints.quantized.decoded import decoded
from peft_posthoc.checkpoints.sample import chosen, corners
from peft_posthoc.errors import PosthocError
from peft_posthoc.files import regular

_LARGEST_CARD = 1_000_000
# ||a - b|| / ||a|| of a weight and its quantised form: 0.1 at 4 bits, 0.4 at 2. Of two models it is above 1.
_ROUNDED = 0.5


class NamedBase(NamedTuple):
    """A model that another one says it was made from."""

    name: str
    by: str
    """What says so: `card`, `configuration`, which names whatever it was loaded from, or `adapter`."""
    revision: str | None = None
    """Of a hub id, if one is named."""


def bases_of(checkpoint: Checkpoint) -> list[NamedBase]:
    """What a model says that it was made from: its card first, then its configuration.

    Args:
        checkpoint: As it was opened.
    """
    folder = place_of(checkpoint)
    loaded = (checkpoint.config or {}).get("_name_or_path")
    named = [] if folder is None else _in_card(folder / "README.md")
    if not named and checkpoint.revision is not None and is_repo_id(checkpoint.label):
        named = bases_in_card(checkpoint.label, checkpoint.revision)
    found = [NamedBase(name, "card") for name in named]
    found += [NamedBase(loaded, "configuration")] if isinstance(loaded, str) else []
    own = {"", str(folder), checkpoint.label}
    return [one for one in found if one.name not in own]


def base_of(config: Mapping[str, Any]) -> NamedBase | None:
    """The base that an adapter names; None if it names none.

    Args:
        config: The adapter's.
    """
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        return None
    here = exists(name) or not isinstance(revision, str)
    return NamedBase(name.rstrip("/") or name, "adapter", None if here else revision or None)


def _in_card(card: Path) -> list[str]:
    """The models that a model's card says it was made from; none where it cannot be read: it is for people."""
    if not exists(card):
        return []
    import yaml
    from huggingface_hub import metadata_load

    try:
        small = regular(card).stat().st_size <= _LARGEST_CARD
        told: Any = (metadata_load(card) or {}).get("base_model") if small else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    return [one for one in (told if isinstance(told, list) else [told]) if isinstance(one, str)]


def same_base(one: str, other: str) -> bool:
    """Tell whether two names are of one base, as far as can be told from here.

    A path is the same however it is written. Of two folders that are here the tensors tell, but for quantising;
    otherwise the last name does, for a folder that was moved, or is a copy of a model on the hub.

    Args:
        one: A path or a hub id.
        other: Another one.
    """
    if Path(one) == Path(other) or _same_place(Path(one), Path(other)):
        return True
    if isdir(one) and isdir(other):
        return _same_tensors(Path(one), Path(other))
    return _last(one) == _last(other) or _in_cache(one, other) or _in_cache(other, one)


def another_base(config: Mapping[str, Any], given: str) -> str | None:
    """A sentence about a base that is not the one which the adapter names; None where it is, or nobody can tell.

    Args:
        config: The adapter's.
        given: The path or hub id of the one to be used; other words for a model tell nothing.
    """
    named = base_of(config)
    if named is None or not (exists(given) or is_repo_id(given)) or same_base(named.name, given):
        return None
    return f"The adapter names `{named.name}` as its base, and `{given}` was given."


def _last(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].casefold()


def _in_cache(repo_id: str, path: str) -> bool:
    """Tell whether a path is within the hub's cache of a model."""
    return f"models--{repo_id.replace('/', '--')}" in Path(path).absolute().parts


def _same_place(one: Path, other: Path) -> bool:
    """Tell whether two paths are one folder, or a folder and the file of weights in it."""
    if not (exists(one) and exists(other)):
        return False
    if one.is_file() and other.is_file():  # A folder may hold a model in several types.
        return one.samefile(other)
    return len({path.resolve().parent if path.is_file() else path.resolve() for path in (one, other)}) == 1


def _same_tensors(one: Path, other: Path) -> bool:
    try:
        left, right = (decoded(Folder(path, label=str(path))) for path in (one, other))
        shapes = [{name: header.shape for name, header in side.headers.items()} for side in (left, right)]
        if shapes[0] != shapes[1]:
            return False
        names = chosen(left)
        ours, theirs = (corners(side, names) for side in (left, right))
        if any(side.coded_as(name) for side in (left, right) for name in left.headers):
            return all(_rounded(ours[name], theirs[name]) for name in names)
        same = bool(names) and left.headers == right.headers
        return same and all(torch.equal(ours[name], theirs[name]) for name in names)
    except PosthocError:
        return False


def _rounded(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same but for quantising."""
    both = one.double().flatten(), other.double().flatten()
    return bool((both[0] - both[1]).norm() <= _ROUNDED * max(x.norm() for x in both))
