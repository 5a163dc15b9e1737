"""An extraction between its beginning and its end: what is to be done, what is kept of it, and what comes of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from peft_posthoc.checkpoints.mean import members
from peft_posthoc.errors import AdapterError, FetchError, PosthocError, ShareDone
from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.outcomes import Outcome
from peft_posthoc.extraction.preflight import Preflight, check
from peft_posthoc.extraction.prepare import Prepared, prepare
from peft_posthoc.extraction.request import Request
from peft_posthoc.extraction.row import left_out
from peft_posthoc.extraction.series import Series
from peft_posthoc.extraction.spool import Spool
from peft_posthoc.lineage.kin import Kin
from peft_posthoc.ranks.rules import is_value, several
from peft_posthoc.sources import Source, sides
from peft_posthoc.text import asked, percent


@dataclass(frozen=True)
class Begun:
    """An extraction of which every choice is made, and no tensor read."""

    prepared: Prepared
    request: Request
    needs: Preflight
    place: Path | None
    """Where the adapter will be."""
    spool: Spool | None
    """Finished layers; None where nothing can be kept."""
    nothing_kept: str | None
    """Why nothing can."""
    kin: Kin
    """Whether the two are, by what is read."""

    @property
    def names(self) -> Sequence[str]:
        """The tensors of both checkpoints."""
        return list(self.prepared.plan.headers)

    def bytes(self, name: str) -> int:
        """Of one tensor, in both."""
        sides = (self.prepared.base, self.prepared.tuned)
        return sum(side.headers[name].bytes for side in sides if name in side.headers)

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(header.bytes for header in self.prepared.plan.headers.values())

    def all(self, outcomes: list[Outcome]) -> list[Outcome]:
        """What is known of every tensor, once the other processes have handed over theirs.

        Args:
            outcomes: Of this process' share.

        Raises:
            AdapterError: Another run has written the adapter meanwhile.
        """
        spool = self.spool
        while spool is not None and len(outcomes) < len(self.names):
            if spool.was_overtaken():
                raise AdapterError(
                    "Another run has written its adapter to the same folder. Give each run one of its own."
                )
            # Should another process die, the launcher ends this one too.
            time.sleep(0.05)
            outcomes = spool.outcomes(self.names) if len(spool) >= len(self.names) else outcomes
        return outcomes

    def finish(self, outcomes: list[Outcome]) -> Adapter:
        """The adapter.

        Args:
            outcomes: Of every tensor.

        Raises:
            AdapterError: It holds less than `min_energy` of the whole fine-tune.
            NothingToCarryError: Nothing changed that LoRA can carry.
            ValueError: None of the ranks are within what was asked for.
        """
        adapter = self.prepared.adapter(outcomes, tuned_name=self.request.options["tuned_name"])
        adapter = self.prepared.settle(adapter)
        # Where other processes, or an earlier run, read some of it, nobody has seen all.
        if (doubt := self.kin.doubt) is not None and self.kin.seen == len(self.names):
            adapter = replace(adapter, notes=(*adapter.notes, doubt))
        if (least := self.request.options["min_energy"]) is not None:
            _check_energy(adapter, self.request.rank, least)
        return adapter

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what is finished where the work is interrupted, and tell of it; nothing where it cannot be done."""
        spool = self.spool
        try:
            yield
        except (KeyboardInterrupt, FetchError) as interrupt:
            if spool is not None and len(spool):
                interrupt.add_note(
                    f"{len(spool)} of {len(self.names)} weights are done and kept in `{spool.folder}`. "
                    "The same command goes on from there."
                )
            elif self.nothing_kept and self.place is not None:
                interrupt.add_note(f"Nothing is kept of what is done: {self.nothing_kept}.")
            raise
        except (PosthocError, ValueError) as error:
            if spool is not None and not isinstance(error, ShareDone):
                spool.remove()
            raise


def begin(
    base: Source,
    tuned: Source,
    request: Request,
    *,
    out: str | PathLike[str] | None = None,
    at_once: bool = False,
    shared: bool = False,
) -> Begun:
    """Open both checkpoints, decide everything and see that it can be done; no tensor is read.

    Args:
        base: As in `extract`.
        tuned: As in `extract`.
        request: What is asked for.
        out: Where the adapter will be.
        at_once: Keep every result on disk as soon as it is there.
        shared: Several processes do the work; so they hand over what they did.

    Raises:
        AdapterError: The adapter would replace what it is made from, cannot be laid out, or there is no room for it.
        CheckpointError: A checkpoint cannot be read.
        MismatchError: The two are not states of one model.
        NothingToCarryError: No weight can be carried.
        ValueError: An argument makes no sense.
    """
    place = None if out is None else Path(out).absolute()
    if place is not None:
        _check_not_read(place, base, tuned)
    prepared = prepare(base, tuned, request)
    needs = check(prepared, out)
    spool, nothing_kept = None, _why_nothing_is_kept(prepared, place)
    if nothing_kept:
        if shared:
            raise ValueError(f"Several processes hand over what they did beside the adapter, and {nothing_kept}.")
    elif place is not None:
        carried = {name: [place.module for place in places] for name, places in prepared.plan.carried.items()}
        spool = Spool(place, [*(model.identity for model in prepared.models), prepared.options, carried])
        if at_once or shared:
            spool.patience = 0.0
    kin = Kin(prepared.base.label, prepared.tuned.label, unrelated=bool(request.options["unrelated"]))
    return Begun(prepared, request, needs, place, spool, nothing_kept, kin)


def losses(adapter: Adapter) -> list[tuple[str, float]]:
    """What is left out, by reason in the words of whoever asked: its share of the whole fine-tune, largest first."""
    fates = adapter.plan.left_out
    losses = [(fates[rows[0].weight].hint, share) for rows, share in left_out(adapter.report.rows).values()]
    return sorted(losses, key=lambda loss: -loss[1])


def _check_energy(adapter: Adapter, rank: object, least: float) -> None:
    """See that the adapter, or each of several, holds enough of the whole fine-tune.

    Raises:
        AdapterError: One does not.
    """
    for one in Series.of(adapter, rank).adapters.values() if isinstance(rank, several) else [adapter]:
        totals = one.report.totals
        if totals.energy_of_all < least:
            lost = "; ".join(f"{percent(share)}: {why}" for why, share in losses(one))
            raise AdapterError(
                f"At rank {totals.rank} the adapter holds {totals.of_all} of the whole fine-tune's energy, less than "
                f"`{asked('min_energy', least)}`, and is not written. Its weights hold {percent(totals.energy)} of "
                f"their deltas'. Left out is {lost or 'nothing else'}."
            )


def _why_nothing_is_kept(prepared: Prepared, out: Path | None) -> str | None:
    """Why another process, or a later one, could not go on from finished layers; None if it can."""
    if out is None:
        return "there is no `out`"
    if not all(model.identity for model in prepared.models):
        return "a model that is not on disk has nothing to know it by"
    if not all(map(is_value, (*prepared.rules.values(), prepared.allocation))):
        return "a rank rule that is no dataclass, such as a function, has nothing to know it by"
    return None


def _check_not_read(out: Path, *sources: Source) -> None:
    """See that the adapter does not take the place of what it is made from.

    Raises:
        AdapterError: It would.
    """
    for source in (str(one) for one in sources if isinstance(one, str | PathLike)):
        for part in (source, *(members(source) or sides(source) or ())):
            if out.exists() and Path(part).exists() and out.samefile(part):
                raise AdapterError(f"`{part}` is what the adapter is made from. Choose another folder for the adapter.")
