"""One reading of the base, from which all fine-tunes of a fleet are extracted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from peft_posthoc.checkpoints.shared import Shared
from peft_posthoc.compute.workers import Workers
from peft_posthoc.extraction.delta import Pair
from peft_posthoc.extraction.estimate import costs
from peft_posthoc.extraction.outcomes import Outcome
from peft_posthoc.extraction.processes import Processes
from peft_posthoc.extraction.read import read_pair
from peft_posthoc.extraction.work import at_work, outcome_of
from peft_posthoc.fleet.member import Member
from peft_posthoc.progress import progress_bar


class _Item(NamedTuple):
    """A weight of one fine-tune."""

    member: Member
    name: str


class _Read(NamedTuple):
    """A weight of one fine-tune that was read; None where it could not be."""

    member: Member
    pair: Pair | None


def drive(members: Sequence[Member], shared: Sequence[Shared], processes: Processes, *, progress: bool) -> None:
    """Work out this process' share of every weight of every fine-tune; results are kept by their members.

    What needs the same tensors of the base is done together, so that each is read once. In memory are the tensors that
    the weights in work need, and no more.

    Args:
        members: Those that are begun.
        shared: What they read together: the base, and the one that is served.
        processes: Those that share the work: all that needs the same tensor is one's.
        progress: Show a progress bar.
    """
    items = _left(_share(members, shared[0], processes))
    for step, (member, name) in enumerate(items):
        prepared = member.work.prepared
        for one in shared:
            for side in (prepared.base, prepared.served):
                if side is not None and name in side.headers:
                    one.expect(step, one.within(side, name))
    options, device = members[0].work.request.options, members[0].work.prepared.device
    largest = max(member.work.largest for member in members)

    def read(at: tuple[int, _Item]) -> _Read:
        step, (member, name) = at
        pair, prepared = None, member.work.prepared
        with member.alone():
            if member.is_open:
                only, kin = prepared.plan.carried, member.work.kin
                pair = read_pair(prepared.base, prepared.tuned, name, served=prepared.served, only=only, kin=kin)
        for one in shared:
            one.done(step)
        return _Read(member, pair)

    total = sum(member.work.bytes(name) for member, name in items)
    shown = progress and processes.rank == 0
    bar = progress_bar(total=total, unit="B", unit_scale=True, desc="Extracting", progress=shown)
    factoring = at_work(largest, exact=options["exact"], device=device)
    with bar, Workers(waiting=1, torch_threads=1) as reader, factoring as (workers, devices):

        def work(read: _Read) -> tuple[Member, Outcome | None]:
            outcome, (member, pair) = None, read
            with member.alone():
                if pair is not None and member.is_open:
                    fate = member.work.prepared.plan.fates[pair.name]
                    with devices.one() as where:
                        outcome = outcome_of(pair, fate, exact=options["exact"], device=where)
            return member, outcome

        pairs = reader.map(read, enumerate(items))
        for member, outcome in workers.map(work, pairs, size=lambda one: one.pair.bytes if one.pair else 0):
            if outcome is not None:
                _keep(member, outcome)
                bar.update(member.work.bytes(outcome.weight))


def _keep(member: Member, outcome: Outcome) -> None:
    with member.alone():
        if not member.is_open:
            return
        if member.work.spool is None:
            member.outcomes.append(outcome)
        else:
            member.work.spool.put(outcome)


def _share(members: Sequence[Member], base: Shared, processes: Processes) -> list[_Item]:
    """This process' share, the costliest first: weights that need the same tensor of the base together."""
    groups: dict[str, list[_Item]] = {}
    load: dict[str, float] = {}
    for member in members:
        prepared = member.work.prepared
        for name, cost in costs(prepared).items():
            within = base.within(prepared.base, name) if name in prepared.base.headers else set()
            group = min(within, default=f"{name} of {member.name}")
            groups.setdefault(group, []).append(_Item(member, name))
            load[group] = load.get(group, 0.0) + cost
    # Pieces of one tensor (experts) each by itself: what is made of it is worked on while the others are read.
    return list(
        chain.from_iterable(sorted(groups[group], key=lambda item: item.name) for group in processes.share(load))
    )


def _left(items: Sequence[_Item]) -> list[_Item]:
    """Those that no earlier run has done."""
    done: dict[str, set[str]] = {}
    for member, names in _by_member(items):
        spool = member.work.spool
        done[member.name] = {outcome.weight for outcome in spool.outcomes(names)} if spool else set()
    return [item for item in items if item.name not in done[item.member.name]]


def _by_member(items: Sequence[_Item]) -> Iterator[tuple[Member, list[str]]]:
    for member in {id(item.member): item.member for item in items}.values():
        yield member, [item.name for item in items if item.member is member]
