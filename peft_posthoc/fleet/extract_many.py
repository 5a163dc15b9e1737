"""From one base and many fine-tunes of it to an adapter for each."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Unpack

from peft_posthoc.adapters.writer import check_target
from peft_posthoc.checkpoints.hub import check_room
from peft_posthoc.checkpoints.shared import Shared
from peft_posthoc.errors import AdapterError, CheckpointError, PosthocError, ShareDone, noting
from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.begun import begin
from peft_posthoc.extraction.estimate import seconds
from peft_posthoc.extraction.preflight import streamed
from peft_posthoc.extraction.processes import ALONE, Processes
from peft_posthoc.extraction.request import Options, Request, takes_options
from peft_posthoc.files import free_at
from peft_posthoc.fleet import handover
from peft_posthoc.fleet.drive import drive
from peft_posthoc.fleet.fleet import Fleet
from peft_posthoc.fleet.made import Made, report_of
from peft_posthoc.fleet.member import Member
from peft_posthoc.fleet.named import named
from peft_posthoc.fleet.planned import Planned
from peft_posthoc.ranks.rules import Rank, several
from peft_posthoc.room import clear_beside
from peft_posthoc.sources import Source, open_checkpoint
from peft_posthoc.text import asked, size


@takes_options
def extract_many(
    base: Source,
    tuned: Mapping[str, Source] | Sequence[Source],
    rank: Rank | Request = 32,
    *,
    out: str | os.PathLike[str],
    force: bool = False,
    processes: Processes = ALONE,
    progress: bool = False,
    **options: Unpack[Options],
) -> Fleet:
    """Extract an adapter of each of many fine-tunes of one base, which is read once for all of them.

    Each adapter is what `extract` and `save` make, bit for bit. A fine-tune that fails is a row of the result, and the
    others go on. Finished layers are kept until their adapter is written: an interrupted run with the same inputs and
    options goes on from there, and makes no adapter again that is there.

    Args:
        base: The model before, as `extract` takes it.
        tuned: Fine-tunes of it; or, by the name of its adapter's folder, each.
        rank: As in `extract`, but for several in one.
        out: The folder that the adapters' folders are in.
        force: Replace other adapters that are there.
        processes: Those that share the work, as `Processes.from_environment()` finds them.
        progress: Show a progress bar on stderr.
        **options: As `Options` has them.

    Raises:
        AdapterError: There is no room for the adapters.
        CheckpointError: The base cannot be read.
        ShareDone: This is not the first of several processes, and its share is done.
        ValueError: An argument makes no sense.
    """
    place = Path(out).absolute()
    shared, members = _begun(base, tuned, Request.of(rank, **options), place, processes)
    made = Made(place)
    for member in members:
        clear_beside(member.place)  # Before it is seen what room there is on the disk.
        with member.alone():
            if member.is_open and made.has(member):
                member.state = "was there"
            elif member.is_open:
                check_target(member.place, force=force)
    to_do = [member for member in members if member.is_open]
    _check_room(to_do, shared, place)
    with _told_of_what_is_kept(to_do):
        if to_do:
            drive(to_do, shared, processes, progress=progress)
        if processes.rank > 0:
            for member in to_do:
                if member.error is not None and member.work.spool is not None:
                    member.work.spool.fail(member.error)
            handover.leave(place, processes)
            raise ShareDone("This process has done its share; the first one has the adapters.")
        _finish(to_do, made, processes, place, force=force)
    for member in members:
        if member.state in ("made", "was there"):
            member.report = report_of(member.place)
    with noting(f"The adapters are in `{out}`."):
        return Fleet.of(shared[0].label, members)


@takes_options
def preflight_many(
    base: Source,
    tuned: Mapping[str, Source] | Sequence[Source],
    rank: Rank | Request = 32,
    *,
    out: str | os.PathLike[str],
    **options: Unpack[Options],
) -> Planned:
    """See what `extract_many` with the same arguments will do, and whether it can; no tensor is read.

    Args:
        base: The model before.
        tuned: Fine-tunes of it.
        rank: As in `extract_many`.
        out: Where the adapters would be.
        **options: As `Options` has them.

    Raises:
        AdapterError: There is no room for the adapters.
        CheckpointError: The base cannot be read.
        ValueError: An argument makes no sense.
    """
    place = Path(out).absolute()
    shared, members = _begun(base, tuned, Request.of(rank, **options), place, ALONE)
    good = [member for member in members if member.is_open]
    _check_room(good, shared, place)
    # Much the same for all: one is measured.
    each = seconds(good[0].work.prepared) if good else (0.0, 0.0)
    return Planned(shared, members, place, (len(good) * each[0], len(good) * each[1]))


def _begun(
    base: Source,
    tuned: Mapping[str, Source] | Sequence[Source],
    request: Request,
    out: Path,
    processes: Processes,
) -> tuple[list[Shared], list[Member]]:
    """What is read together, and every fine-tune with what is to be done of it, or why nothing can be."""
    if isinstance(request.rank, several):
        raise ValueError("A fleet takes one rank rule; `phlora resize` makes its adapters smaller.")
    options = request.options
    for name in ("tuned_revision", "tuned_name"):
        if options[name] is not None:
            raise ValueError(f"`{asked(name, options[name])}` belongs to one fine-tune, not to a fleet.")
    if out.exists() and not out.is_dir():
        raise AdapterError(f"`{out}` is a file. Name a folder for the adapters' folders.")
    found = named(tuned)
    stream = options["stream"]
    opened = open_checkpoint(base, revision=options["base_revision"], role="base", modules=True, stream=stream)
    shared = [Shared(opened)]
    # Both were opened here, and stay as they are.
    request = Request.of(request, base_revision=None)
    if options["for_base"] is not None:
        shared.append(Shared(open_checkpoint(options["for_base"], role="served base", stream=stream)))
        request = Request.of(request, for_base=shared[1])
    members = [Member(name, source, out / name) for name, source in found.items()]
    for member in members:
        with member.alone():
            _check_not_base(base, member.place)
            member.begun = begin(
                shared[0], member.source, request, out=member.place, at_once=True, shared=processes.size > 1
            )
            if shared[0].sequential or member.work.prepared.tuned.sequential:
                raise CheckpointError(f"`{member.name}` is made as it is read. Extract it by itself.")
    return shared, members


def _check_not_base(base: Source, place: Path) -> None:
    if isinstance(base, str | os.PathLike) and place.exists() and Path(base).exists() and place.samefile(base):
        raise AdapterError(f"`{base}` is what the adapters are made from. Choose another folder for them.")


def _check_room(members: Sequence[Member], shared: Sequence[Shared], out: Path) -> None:
    """See that there is room for all adapters together.

    Raises:
        AdapterError: There is none at their place.
        CheckpointError: There is none for what is downloaded.
    """
    needed = sum(member.work.needs.disk_bytes for member in members if member.work.needs.rank_is_known)
    free = free_at(out)
    if needed > free:
        raise AdapterError(
            f"`{out}` needs {size(needed)} ({len(members)} adapters, and finished layers until they are written), and "
            f"{size(free)} are free there. Choose another folder, or a lower rank."
        )
    sides = [*shared, *(member.work.prepared.tuned for member in members)]
    fetched = [side for side in sides if side.to_fetch]
    check_room(
        sum(side.to_fetch for side in fetched),
        *(side.label for side in fetched),
        out=out,
        taken=needed,
        instead=streamed(),
    )


def _finish(members: Sequence[Member], made: Made, processes: Processes, out: Path, *, force: bool) -> None:
    """Write each adapter as soon as all of its layers are there; what others did of one that failed goes."""
    waiting = list(members)
    while waiting:
        waiting = [member for member in waiting if not _is_finished(member, made, processes, force=force)]
        if waiting:
            # Should another process die, the launcher ends this one too.
            time.sleep(0.05)
    handover.wait(out, processes)
    for member in members:
        if member.work.spool is not None and member.error is not None and not member.keeps:
            member.work.spool.remove()


def _is_finished(member: Member, made: Made, processes: Processes, *, force: bool) -> bool:
    spool, names = member.work.spool, member.work.names
    if spool is not None and processes.size > 1 and member.is_open and len(spool) < len(names):
        why = spool.failed(since=handover.start())
        if why is None and not spool.was_overtaken():
            return False
        member.fail(PosthocError(why or "Another run has written its adapter to the same folder."))
    with member.alone():
        if member.is_open:
            outcomes = spool.outcomes(names) if spool is not None else member.outcomes
            if spool is not None and len(outcomes) < len(names):
                raise AdapterError(
                    f"{len(names) - len(outcomes)} finished layers in `{spool.folder}` cannot be read. Start again."
                )
            _save(member.work.finish(outcomes), member, made, force=force)
    return True


def _save(adapter: Adapter, member: Member, made: Made, *, force: bool) -> None:
    made.note(member, adapter.report.to_dict())
    adapter.save(member.place, force=force)
    member.outcomes.clear()
    member.state = "made"


@contextlib.contextmanager
def _told_of_what_is_kept(members: Sequence[Member]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        kept = sum(len(member.work.spool) for member in members if member.work.spool is not None)
        made = sum(member.state == "made" for member in members)
        interrupt.add_note(
            f"{made} of {len(members)} adapters are written, and {kept} finished layers of the others are kept beside "
            "them. The same command goes on from there."
        )
        raise
