"""The base that an adapter names, against the one that is given for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.folder import Folder
from peft_posthoc.checkpoints.hub import is_repo_id
from peft_posthoc.checkpoints.wrappers import unwrapped
from peft_posthoc.errors import PosthocError

# Tensors that are read of two folders to tell whether they hold one model.
_SAMPLE = 8


def another_base(config: Mapping[str, Any], base: Checkpoint) -> str | None:
    """A sentence about a base that is not the one which the adapter names; None where it is, or nobody can tell.

    A path is the same however it is written; a folder is the same as another one, or as a model of the hub, that has
    its last name, or its tensors.

    Args:
        config: The adapter's.
        base: As it was opened, before anything is made of it.
    """
    named, given = config.get("base_model_name_or_path"), base.label
    if not isinstance(named, str) or not named or not (Path(given).exists() or is_repo_id(given)):
        return None
    if _plain(named) == _plain(given) or _same_place(Path(named), Path(given)):
        return None
    if Path(named).is_dir() and Path(given).is_dir():
        same = _same_tensors(Path(named), base)
    else:
        same = _last(named) == _last(given) or _in_cache(named, given) or _in_cache(given, named)
    return None if same else f"The adapter names `{named}` as its base, and `{given}` was given."


def _plain(name: str) -> str:
    return str(Path(name)).casefold() if is_repo_id(name) else str(Path(name))


def _last(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].casefold()


def _in_cache(repo_id: str, path: str) -> bool:
    """Tell whether a path is within the hub's cache of a model."""
    return f"models--{repo_id.replace('/', '--')}" in Path(path).absolute().parts


def _same_place(one: Path, other: Path) -> bool:
    """Tell whether two paths are one folder, or a folder and the file of weights in it."""
    if not (one.exists() and other.exists()):
        return False
    return len({path.resolve().parent if path.is_file() else path.resolve() for path in (one, other)}) == 1


def _same_tensors(folder: Path, base: Checkpoint) -> bool:
    try:
        other = unwrapped(Folder(folder, label=str(folder)))
        if other.headers != base.headers:
            return False
        names = list(other.headers)
        some = names[:: max(1, len(names) // _SAMPLE)]
        return all(torch.equal(other.read(name), base.read(name)) for name in some)
    except PosthocError:
        return False
