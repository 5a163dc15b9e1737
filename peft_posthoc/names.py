"""One name for one weight: what two checkpoints of a model may call it, brought together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from peft_posthoc.checkpoint import Checkpoint
from peft_posthoc.errors import MismatchError
from peft_posthoc.layout import Layout
from peft_posthoc.view import View, same

# Parts of a name that a wrapper may have put before the rest.
_DEEPEST = 4


class Renamed(NamedTuple):
    """A checkpoint under other names."""

    checkpoint: Checkpoint
    rules: tuple[str, ...]
    """What was done, a line for each rule, with how many names it changed."""


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The checkpoint with new names for some of its tensors, by the old ones.

    Raises:
        MismatchError: Two tensors would have one name.
    """
    found: dict[str, str] = {}
    for old in checkpoint.headers:
        new = names.get(old, old)
        if new in found:
            raise MismatchError(
                f"`{found[new]}` and `{old}` of `{checkpoint.label}` would both be `{new}`. Give `--map` a pattern "
                "that leaves one of them alone."
            )
        found[new] = old
    pieces = {new: same(checkpoint, old) for new, old in found.items()}
    # The module is the same; a folder's files have the old names, which transformers knows.
    return View(checkpoint, pieces, loadable=True, module=checkpoint.module)


def by_rules(checkpoint: Checkpoint, rules: Iterable[str]) -> Renamed:
    """The checkpoint under the names that `regex=>replacement` rules give, each applied to what the one before left.

    Raises:
        ValueError: A rule is malformed.
        MismatchError: Two tensors would have one name.
    """
    names = {name: name for name in checkpoint.headers}
    told = []
    for rule in rules:
        pattern, arrow, replacement = rule.partition("=>")
        if not arrow:
            raise ValueError(f"`--map {rule}` is no rule: give `regex=>replacement`.")
        try:
            after = {old: re.sub(pattern, replacement, name) for old, name in names.items()}
        except re.error as error:
            raise ValueError(f"`--map {rule}` is not a regular expression and its replacement: {error}.") from error
        count = sum(after[old] != name for old, name in names.items())
        if count:
            told.append(f"--map {rule}: {count} names of `{checkpoint.label}`")
        names = after
    return Renamed(renamed(checkpoint, names) if told else checkpoint, tuple(told))


def as_named(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]], layout: Layout) -> Renamed:
    """The checkpoint under other names for the same tensors, as far as they are found.

    Tried in turn for the names that are not wanted: what the model itself calls them (transformers 4 against 5, a bare
    model against one with a head); then another beginning, the same for many (`module.`, `model.` against
    `model.language_model.`).

    Args:
        checkpoint: What is renamed.
        wanted: The names to have, each with the shape of its tensor.
        layout: Of the model.

    Raises:
        MismatchError: Another beginning would do as well.
    """
    free = {name: shape for name, shape in wanted.items() if name not in checkpoint.headers}
    by_own = {layout.name_of(name): name for name in free}
    strange = {name: header.shape for name, header in checkpoint.headers.items() if name not in wanted}
    names = {name: by_own[own] for name in strange if (own := layout.name_of(name)) in by_own}
    told = []
    if names:
        one = next(iter(names))
        told.append(f"{len(names)} as the model itself names them (`{one}` is `{names[one]}`)")
    while found := _by_beginning(
        {name: shape for name, shape in strange.items() if name not in names},
        {name: shape for name, shape in free.items() if name not in names.values()},
        checkpoint.label,
    ):
        one = next(iter(found))
        told.append(f"{len(found)} with another beginning (`{one}` is `{found[one]}`)")
        names |= found
    notes = tuple(f"Names of `{checkpoint.label}`: {line}" for line in told)
    return Renamed(renamed(checkpoint, names) if names else checkpoint, notes)


def _by_beginning(
    strange: Mapping[str, tuple[int, ...]], free: Mapping[str, tuple[int, ...]], label: str
) -> dict[str, str]:
    """The new names that the one change of their beginning gives that fits the most.

    Raises:
        MismatchError: Two changes fit as many, and give some of them different names.
    """
    ends: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in free:
        parts = name.split(".")
        for cut in range(min(_DEEPEST, len(parts) - 2) + 1):
            ends[tuple(parts[cut:])].append(name)
    found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name, shape in strange.items():
        parts = name.split(".")
        for cut in range(min(_DEEPEST, len(parts) - 2) + 1):
            for new in ends.get(tuple(parts[cut:]), ()):
                begins = new.split(".")[: len(new.split(".")) - len(parts) + cut]
                # The shortest change: what both begin with differs where the rest starts.
                if free[new] == shape and (not cut or not begins or parts[cut - 1] != begins[-1]):
                    found[".".join(parts[:cut]), ".".join(begins)][name] = new
    if not found:
        return {}
    most = max(map(len, found.values()))
    first, *others = [names for names in found.values() if len(names) == most]
    for other in others:
        if clash := [name for name in first if other.get(name, first[name]) != first[name]]:
            raise MismatchError(
                f"`{clash[0]}` of `{label}` may be `{first[clash[0]]}` or `{other[clash[0]]}`. Say which with `--map "
                "'regex=>replacement'`."
            )
    return first
