"""Before the work: what an adapter would hold, what the work needs, and whether it can be done; from headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Unpack

from peft_posthoc.adapters.planned import Planned
from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.hub import check_room
from peft_posthoc.checkpoints.mean import members, stand_in
from peft_posthoc.errors import AdapterError
from peft_posthoc.extraction.estimate import ASSUMED, seconds
from peft_posthoc.extraction.forms.lay_out import lay_out
from peft_posthoc.extraction.forms.layout import FileLayout
from peft_posthoc.extraction.plan import Plan
from peft_posthoc.extraction.prepare import Prepared, prepare
from peft_posthoc.extraction.reasons import Reason
from peft_posthoc.extraction.request import Options, Request, takes_options
from peft_posthoc.files import free_at
from peft_posthoc.linalg.spectrum import in_advance
from peft_posthoc.pairing.difference import Difference
from peft_posthoc.pairing.differences import told_as_notes, told_as_warnings
from peft_posthoc.ranks.rules import Rank
from peft_posthoc.sources import Source
from peft_posthoc.text import asked, shorten, size, took

# Python and PyTorch alone. With what `_work` adds, estimates were 0.96 to 1.20 of what was measured: 12 layers of
# 768 x 3072 (291 against 242 MB), one of Llama 7B at rank 32 and 128 (729, 746; 875, 909), 4 of 2048 x 5632 (505, 471).
_PROCESS = 230e6


@dataclass(frozen=True)
class PreflightRow:
    """One tensor, as far as it is known before it is read."""

    weight: str
    status: Literal["carried", "whole", "left out"]
    reason: str
    """Why it is not carried; empty where it is."""
    modules: tuple[str, ...]
    kind: str
    """Of layer; empty where it has no factors."""
    shape: tuple[int, ...]
    dtype: str
    rank: int
    bytes: int
    """In the adapter file, at most."""
    cause: Reason | None = None
    """The reason as a code."""
    way_out: Mapping[str, Any] = field(default_factory=dict)
    """Options that decide it, by name; null where their value is the user's to find."""


@dataclass(frozen=True)
class Preflight:
    """What an extraction will do, if every tensor has changed."""

    rows: tuple[PreflightRow, ...]
    rank_is_known: bool
    """Whether the rule gives a rank without looking at the spectra; if not, sizes are for rank 32."""
    values: float
    """The share of the tuned checkpoint's values in tensors that are carried or kept whole."""
    read_bytes: int
    """Of all checkpoints."""
    adapter_bytes: int
    disk_bytes: int
    """Needed at the adapter's folder, with what is kept there until the adapter is written."""
    disk_free: int | None
    """None where no folder was named."""
    download_bytes: int
    """Of weights on the hub that are not in its cache yet."""
    stream_bytes: int
    """Of weights elsewhere that are fetched when they are read, and not kept."""
    memory_bytes: int
    """An estimate, without mapped files, which the system takes back when it needs to."""
    layout: str
    """Where the kinds of the layers come from."""
    notes: tuple[str, ...]
    differences: tuple[Difference, ...] = ()
    """Of configuration and tokenizer: what no adapter carries."""
    seconds: tuple[float, float] | None = None
    """About how long the work takes on this machine, from deltas of low rank to noise; without fetching. None where it
    was not measured."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"format": 1, **asdict(self)}

    def table(self) -> str:
        """For a terminal: the tensors, what is left out by reason, and what it needs."""
        lines = [f"{'weight':<52} {'kind':<11} {'shape':>16} {'type':>9} {'rank':>5} {'size':>9}"]
        lines += [
            f"{shorten(row.weight):<52} {row.kind:<11} {' x '.join(map(str, row.shape)):>16} {row.dtype:>9} "
            f"{row.rank:>5} {size(row.bytes):>9}"
            for row in self.rows
            if row.status == "carried"
        ]
        return "\n".join([*lines, "", *self.summary()])

    def summary(self) -> list[str]:
        """What is not carried, and what the work needs, a line each."""
        lines = []
        whole = [row for row in self.rows if row.status == "whole"]
        if whole:
            lines.append(f"whole: {len(whole):>7}, {size(sum(row.bytes for row in whole))}")
        reasons: dict[str, list[PreflightRow]] = {}
        for row in self.rows:
            if row.status == "left out":
                reasons.setdefault(row.reason, []).append(row)
        everything = sum(math.prod(row.shape) for row in self.rows)
        for reason, rows in reasons.items():
            share = sum(math.prod(row.shape) for row in rows) / everything
            lines.append(f"left out: {len(rows):>4} x {reason}: {share:.1%} of the values")
        carried = sum(row.status == "carried" for row in self.rows)
        free = "" if self.disk_free is None else f" of {size(self.disk_free)} that are free"
        fetch = f", of which {size(self.download_bytes)} are downloaded" if self.download_bytes else ""
        if self.stream_bytes:
            fetch += f", {'and' if fetch else 'of which'} {size(self.stream_bytes)} are fetched as they are read"
        at = "" if self.rank_is_known else f" at rank {ASSUMED} (the rule decides)"
        lines += [
            f"{carried} weights have factors; with those kept whole, {self.values:.1%} of the model's values. Layers "
            f"by {self.layout}.",
            f"Adapter: at most {size(self.adapter_bytes)}{at}. To read: {size(self.read_bytes)}{fetch}. Disk needed: "
            f"{size(self.disk_bytes)}{free}. Memory: about {size(self.memory_bytes)}.{took(self.seconds)}",
        ]
        warnings = (f"Warning: {warning}" for warning in told_as_warnings(self.differences))
        return [*lines, *self.notes, *told_as_notes(self.differences), *warnings]


@takes_options
def preflight(
    base: Source,
    tuned: Source,
    rank: Rank | Mapping[str, Rank] | Request = 32,
    *,
    out: str | PathLike[str] | None = None,
    **options: Unpack[Options],
) -> Preflight:
    """See what `extract` with the same arguments will do, and whether it can; no tensor is read.

    Args:
        base: The model before.
        tuned: The model after.
        rank: As in `extract`.
        out: Where the adapter would be written.
        **options: As `Options` has them.

    Raises:
        AdapterError: The adapter cannot be laid out in its file, or there is no room for it.
        CheckpointError: A checkpoint cannot be read.
        MismatchError: The two are not states of one model.
        NothingToCarryError: No weight can be carried.
        ValueError: An argument makes no sense.
    """
    return timed(prepare(base, tuned, Request.of(rank, **options)), out)


def timed(prepared: Prepared, out: str | PathLike[str] | None) -> Preflight:
    """What `check` sees, and about how long the work takes."""
    return replace(check(prepared, out), seconds=seconds(prepared))


def check(prepared: Prepared, out: str | PathLike[str] | None) -> Preflight:
    """See what the prepared work needs, and whether it can be done.

    Raises:
        AdapterError: The adapter cannot be laid out in its file, or there is no room for it.
        CheckpointError: There is no room for the weights that are to be downloaded.
    """
    found = _found(prepared, out)
    sides = [side for side in prepared.models if side.to_fetch]
    place = None if out is None else Path(out)
    taken = found.disk_bytes if found.rank_is_known else 0
    check_room(found.download_bytes, *(side.label for side in sides), out=place, taken=taken, instead=streamed())
    if found.disk_free is not None and found.rank_is_known and found.disk_bytes > found.disk_free:
        raise AdapterError(
            f"`{out}` needs {size(found.disk_bytes)} (adapter, and finished layers until it is written), and "
            f"{size(found.disk_free)} are free there. Choose another folder, or a lower rank."
        )
    return found


def planned(prepared: Prepared, out: str | PathLike[str]) -> Planned:
    """The adapter that the prepared work would write: at the ranks that it has at most, or those that are assumed."""
    file = _file(prepared, _ranks(prepared))
    served = prepared.served or prepared.base
    return Planned(Path(out), file.config({"base": served.label, "base_revision": served.revision}), file.tensors)


def streamed() -> str:
    """The way out where weights have no room on the disk, for an error."""
    return f"keep none there (`{asked('stream')}`)"


def _found(prepared: Prepared, out: str | PathLike[str] | None) -> Preflight:
    plan, ranks = prepared.plan, _ranks(prepared)
    file = _file(prepared, ranks)
    rows = tuple(_rows(plan, ranks, file))
    size = sum(row.bytes for row in rows)
    sides = {name: sum(plan.slot(name)[1:]) for name in ranks}
    # Beside the adapter, in float32, until it is written.
    finished = 4 * sum(rank * sides[name] for name, rank in ranks.items())
    finished += sum(_kept_bytes(plan.headers[name], as_bias=how.as_bias) for name, how in plan.kept.items())
    # Factoring takes two deltas, and blocks of vectors that grow with the rank; the allocator keeps some of what is
    # freed.
    deltas = max(4 * math.prod(header.shape) for header in plan.headers.values())
    work = 1.25 * 2 * (deltas + max(4 * 8 * rank * sides[name] for name, rank in ranks.items()))
    read: list[tuple[Checkpoint, Iterable[str]]] = [(side, side.headers) for side in (prepared.base, prepared.tuned)]
    if prepared.served is not None:
        read.append((prepared.served, ranks))
    return Preflight(
        rows=rows,
        rank_is_known=all(in_advance(rule) is not None for rule in prepared.rules.values()),
        values=_values(row for row in rows if row.status != "left out") / _values(rows),
        read_bytes=sum(
            side.headers[name].bytes * max(len(members(side.label)), 1) for side, names in read for name in names
        ),
        adapter_bytes=size,
        disk_bytes=size + finished,
        disk_free=None if out is None else free_at(Path(out)),
        download_bytes=sum(side.to_fetch for side in prepared.models),
        stream_bytes=sum(getattr(side, "to_stream", 0) for side in prepared.models),
        memory_bytes=int(_PROCESS + finished + max(size, work)),
        layout=plan.layout.origin,
        notes=(*prepared.notes, *filter(None, (stand_in(prepared.base.label),))),
        differences=prepared.differences,
    )


def _file(prepared: Prepared, ranks: Mapping[str, int]) -> FileLayout:
    """What is in it. Names that PEFT would misunderstand are found here."""
    return lay_out(prepared.form, prepared.plan, ranks, prepared.plan.kept.keys(), prepared.dtype)


def _ranks(prepared: Prepared) -> dict[str, int]:
    """By weight, the rank that it will have at most, or that is assumed where its rule looks at the spectrum."""
    plan = prepared.plan
    return {
        name: min(in_advance(prepared.rules[name]) or ASSUMED, *plan.slot(name)[1:])
        for name in plan.headers
        if name in plan.carried
    }


def _kept_bytes(header: Header, *, as_bias: bool) -> int:
    """Of what is kept of a tensor until the adapter is written: itself, or of a bias the difference in float32."""
    return 4 * math.prod(header.shape) if as_bias else header.bytes


def _values(rows: Iterable[PreflightRow]) -> int:
    return sum(math.prod(row.shape) for row in rows)


def _rows(plan: Plan, ranks: Mapping[str, int], file: FileLayout) -> Iterable[PreflightRow]:
    in_file = file.bytes_by_module
    for name, header in plan.headers.items():
        places = plan.carried.get(name) or plan.layout.places(name)
        modules = tuple(place.module for place in places if place.module in in_file)
        factored, kept, left_out = name in ranks, name in plan.kept, plan.left_out.get(name)
        yield PreflightRow(
            weight=name,
            status="carried" if factored else "whole" if kept else "left out",
            reason=left_out.text if left_out else "",
            modules=plan.kept[name].modules if kept else modules,
            kind=places[0].kind.name if factored else "",
            shape=header.shape,
            dtype=str(header.dtype).removeprefix("torch."),
            rank=ranks.get(name, 0),
            bytes=file.bytes_of_whole.get(name, 0) if kept else sum(in_file[module] for module in modules),
            cause=left_out.reason if left_out else None,
            way_out=left_out.way_out if left_out else {},
        )
