"""One name for one weight: what two checkpoints of a model may call it, brought together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.view import View, same
from peft_posthoc.errors import MismatchError
from peft_posthoc.models.layout import Layout
from peft_posthoc.patterns import PatternError, replaced
from peft_posthoc.text import as_flag, asked

# Parts of a name that a wrapper may have put before the rest.
_DEEPEST = 4


class Renamed(NamedTuple):
    """A checkpoint under other names."""

    checkpoint: Checkpoint
    notes: tuple[str, ...]
    """The changes, for people."""
    used: frozenset[str] = frozenset()
    """The rules that changed a name."""


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
                f"`{found[new]}` and `{old}` of `{checkpoint.label}` would both be `{new}`. Give "
                f"`{asked('rename', None)}` a pattern that leaves one of them alone."
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
    told: dict[str, str] = {}
    for rule in rules:
        pattern, arrow, replacement = rule.partition("=>")
        if not arrow:
            raise ValueError(f"`{asked('rename', rule)}` is no rule: give `regex=>replacement`.")
        try:
            after = dict(zip(names, replaced(pattern, replacement, list(names.values())), strict=True))
        except PatternError as error:
            wrong = "is not a regular expression"
            problem = error.problem.replace(wrong, f"{wrong} and its replacement")
            raise ValueError(f"`{asked('rename', rule)}` {problem}.") from error
        count = sum(after[old] != name for old, name in names.items())
        if count:
            told[rule] = f"{as_flag('rename')} {rule}: {count} names of `{checkpoint.label}`"
        names = after
    return Renamed(renamed(checkpoint, names) if told else checkpoint, tuple(told.values()), frozenset(told))


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
    # Single experts have no module in the class; of a bare model's they have its names all the same.
    by_own |= {
        name.removeprefix(layout.prefix): name for name in free if layout.prefix and name.startswith(layout.prefix)
    }
    names = {
        name: by_own[own] for name in strange if (own := layout.name_of(name)) in by_own or (own := name) in by_own
    }
    told = []
    if names:
        one = next(iter(names))
        told.append(f"{len(names)} as the model itself names them (`{one}` is `{names[one]}`)")
    changes: list[tuple[str, str]] = []
    taken = set(names.values())
    while change := _change_of_beginning(
        {name: shape for name, shape in strange.items() if name not in names},
        {name: shape for name, shape in free.items() if name not in taken},
        checkpoint.label,
        bulk=min(len(checkpoint.headers), len(wanted)) / 2,
        known={cut for cut, _ in changes if cut},
    ):
        begins, found = change
        changes.append(begins)
        one = next(iter(found))
        told.append(f"{len(found)} with another beginning (`{one}` is `{found[one]}`)")
        names |= found
        taken |= set(found.values())
    for cut, put in changes:
        # What the other does not have goes along, such as the tensors of single experts.
        along = {name: f"{put}{name.removeprefix(cut)}" for name in strange if cut and name.startswith(cut)}
        names |= {old: new for old, new in along.items() if old not in names and new not in taken}
    notes = tuple(f"Names of `{checkpoint.label}`: {line}" for line in told)
    return Renamed(renamed(checkpoint, names) if names else checkpoint, notes)


def _change_of_beginning(
    strange: Mapping[str, tuple[int, ...]],
    free: Mapping[str, tuple[int, ...]],
    label: str,
    *,
    bulk: float,
    known: Collection[str],
) -> tuple[tuple[str, str], dict[str, str]] | None:
    """The one change of their beginning that fits the most names, and those.

    Args:
        strange: The names to change, with the shapes of their tensors.
        free: The names to have.
        label: Of the checkpoint.
        bulk: How many fit where a change is none by chance: a new head resembles some old layer.
        known: Beginnings that are changed already: where they go, some may go elsewhere.

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
                    found["".join(f"{part}." for part in parts[:cut]), "".join(f"{part}." for part in begins)][name] = (
                        new
                    )
    fitting = {
        (cut, put): names
        for (cut, put), names in found.items()
        if cut in known or _is_a_change((cut, put), names, strange, free, bulk)
    }
    if not fitting:
        return None
    most = max(map(len, fitting.values()))
    (change, first), *others = [(one, names) for one, names in fitting.items() if len(names) == most]
    by_new = {new: name for name, new in first.items()}
    for _, other in others:
        for name, new in other.items():
            told = ""
            if first.get(name, new) != new:
                told = f"`{name}` of `{label}` may be `{first[name]}` or `{new}`"
            elif by_new.get(new, name) != name:
                told = f"`{by_new[new]}` and `{name}` of `{label}` may both be `{new}`"
            if told:
                raise MismatchError(f"{told}. Say which with `{asked('rename', 'regex=>replacement')}`.")
    return change, first


def _is_a_change(
    change: tuple[str, str],
    names: Mapping[str, str],
    strange: Mapping[str, object],
    free: Mapping[str, object],
    bulk: float,
) -> bool:
    """Tell whether a change fits the bulk of the model; or a part, such as a vision tower, nearly completely."""
    cut, put = change
    part = max(sum(name.startswith(cut) for name in strange), sum(name.startswith(put) for name in free))
    return len(names) >= bulk or (len(names) >= 10 and 10 * len(names) >= 9 * part)
