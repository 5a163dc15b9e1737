"""What speaks against a pair before it is worked on: what the two say of themselves, and who is nearer."""

from __future__ import annotations

from os.path import isdir
from pathlib import Path

from peft_posthoc.adapters.named_base import NamedBase, bases_of, same_base
from peft_posthoc.checkpoints.checkpoint import Checkpoint, place_of
from peft_posthoc.checkpoints.hub import is_repo_id
from peft_posthoc.checkpoints.hub_cache import cached
from peft_posthoc.checkpoints.mean import stand_in
from peft_posthoc.errors import NothingToCarryError, PosthocError
from peft_posthoc.lineage.whose import whose

# What transformers' Trainer leaves beside a fine-tune's weights.
_OF_A_RUN = ("trainer_state.json", "optimizer.pt", "training_args.bin")


def doubts(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Questions about a pair that looks wrong; none about a fine-tune and its base. No weight is read of most.

    Args:
        base: As it was opened.
        tuned: The same.

    Raises:
        NothingToCarryError: They are the same files.
    """
    if base.identity is not None and base.identity == tuned.identity:
        raise NothingToCarryError(
            f"`{base.label}` and `{tuned.label}` hold the same weights, in the same files: there is nothing to extract."
        )
    said = None if stand_in(base.label) else _swapped(base, tuned)
    return list(filter(None, (said or _another(base, tuned),)))


def _swapped(base: Checkpoint, tuned: Checkpoint) -> str | None:
    """A question, where the base looks like the fine-tune and the tuned model does not."""
    here, there = place_of(base), place_of(tuned)
    ran = here and next((name for name in _OF_A_RUN if (here / name).is_file()), None)
    sign = f"`{base.label}` holds `{ran}` of a training run, and `{tuned.label}` does not" if ran else None
    if there is not None and any((there / name).is_file() for name in _OF_A_RUN):
        sign = None
    if named := next((one.name for one in bases_of(base) if same_base(one.name, tuned.label)), None):
        sign = f"`{base.label}` names `{named}` as its own base"
    return f"Are base and tuned swapped? {sign}." if sign else None


def _another(base: Checkpoint, tuned: Checkpoint) -> str | None:
    """A question, where the tuned model names another base, and that one is nearer or the two name it both."""
    named = bases_of(tuned)
    if not named or any(same_base(one.name, base.label) for one in named):
        return None
    for one in named:
        if told := _nearer(one, base, tuned):
            return told
    own = [] if stand_in(base.label) else [one.name for one in bases_of(base)]
    for name in (one.name for one in named if one.by == "card"):
        if any(same_base(name, other) for other in own):
            return f"Are `{tuned.label}` and `{base.label}` siblings? Both name `{name}` as their base."
    return None


def _nearer(named: NamedBase, base: Checkpoint, tuned: Checkpoint) -> str | None:
    place = Path(named.name) if isdir(named.name) else cached(named.name) if is_repo_id(named.name) else None
    # Of what can be read once, or not without all else, no corner is; codes of the one that is named are its own.
    unread = any(side.sequential or side.to_fetch for side in (base, tuned))
    if place is None or unread or any(map(base.coded_as, base.headers)):
        return None
    try:
        given, other = whose(tuned, [base, place]).candidates
    except PosthocError:
        return None  # Whoever reads all of it says what is wrong with it.
    if other.kind != "parent":
        return None
    return (
        f"Is `{base.label}` the base? `{tuned.label}` names `{named.name}` as its own, and is nearer to it "
        f"({other.evidence}): `{base.label}` is a {given.kind}."
    )
