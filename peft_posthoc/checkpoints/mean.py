"""The mean of several fine-tunes of one base, which stands in for a base that nobody has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from os.path import exists
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header, place_of
from peft_posthoc.errors import CheckpointError

_PREFIX = "mean:"


def members(source: str) -> list[str]:
    """The models that `mean:A,B,C` is of; none if that is not what it says.

    Raises:
        CheckpointError: There are not two.
    """
    if not source.startswith(_PREFIX) or exists(source):
        return []
    found = [part.strip() for part in source.removeprefix(_PREFIX).split(",")]
    if len(found) < 2 or not all(found):
        raise CheckpointError(f"`{source}` is the mean of fewer than two models. Give `mean:A,B,...`.")
    return found


def stand_in(base: str) -> str | None:
    """A warning, where a base is such a mean; None where it is a model.

    Args:
        base: What the user called it.
    """
    count = base.removeprefix(_PREFIX).count(",") + 1
    if not base.startswith(_PREFIX) or exists(base) or count < 2:
        return None
    return (
        f"The base is a stand-in, the mean of {count} models, and the adapter is for that mean: write it with "
        "mergekit's `linear`, and serve on what that writes. The delta holds a part of each of the models' changes too."
    )


class Mean(Checkpoint):
    """The mean of each tensor, computed in float32 and rounded to the models' own type."""

    handed = True

    def __init__(self, parts: Sequence[Checkpoint], *, label: str) -> None:
        """Take several checkpoints as one.

        Args:
            parts: They have the same tensors. What lies beside the first one's weights is the mean's.
            label: What the user called them.

        Raises:
            CheckpointError: One has other tensors than the first, or can be read once only.
        """
        first, *others = self._parts = tuple(parts)
        self.label = label
        for one in parts:
            if one.sequential:
                raise CheckpointError(f"`{one.label}` is made as it is read: no mean is taken of it.")
        for other in others:
            for name in dict.fromkeys((*first.headers, *other.headers)):
                shapes = [side.headers[name].shape if name in side.headers else None for side in (first, other)]
                if shapes[0] != shapes[1]:
                    raise CheckpointError(
                        f"`{label}` is the mean of models with the same tensors. Of `{name}` `{first.label}` "
                        f"{_has(shapes[0])}, and `{other.label}` {_has(shapes[1])}. Give fine-tunes of one base, saved "
                        "in one way."
                    )
        self.headers = {
            name: Header(header.shape, reduce(torch.promote_types, (one.headers[name].dtype for one in parts)))
            for name, header in first.headers.items()
        }
        self.config, self.beside = first.config, place_of(first)
        identities = [one.identity for one in parts]
        self.identity: Any = ["mean", *identities] if all(one is not None for one in identities) else None
        self.to_fetch = sum(one.to_fetch for one in parts)
        self.to_stream: int = sum(getattr(one, "to_stream", 0) for one in parts)

    def read(self, name: str) -> Tensor:
        """The mean of the tensors of that name; no more than one of them is in memory beside it.

        Raises:
            CheckpointError: They are whole numbers, and differ.
        """
        first, *others = self._parts
        dtype = self.headers[name].dtype
        if not dtype.is_floating_point:
            found = first.read(name)
            for other in others:
                if not torch.equal(found, other.read(name)):
                    raise CheckpointError(
                        f"`{name}` is not the same in `{first.label}` and `{other.label}`, and whole numbers have no "
                        "mean."
                    )
            return found
        wide = torch.promote_types(dtype, torch.float32)
        total = first.read(name).to(wide, copy=True)
        for other in others:
            total += other.read(name).to(total.device)
        return total.div_(len(self._parts)).to(dtype)


def _has(shape: tuple[int, ...] | None) -> str:
    return "has none" if shape is None else f"has {list(shape)}"
