"""From two checkpoints to an adapter: the one loop over all weights."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Unpack

import torch
from tqdm import tqdm

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.view import in_stored_order
from peft_posthoc.compute.workers import Workers
from peft_posthoc.errors import AdapterError, LeftOutWarning, PosthocError, ShareDone
from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.delta import Pair
from peft_posthoc.extraction.outcomes import Layer, Outcome
from peft_posthoc.extraction.plan import Plan
from peft_posthoc.extraction.preflight import check
from peft_posthoc.extraction.prepare import Prepared, prepare
from peft_posthoc.extraction.processes import ALONE, Processes
from peft_posthoc.extraction.report import MATERIAL
from peft_posthoc.extraction.request import Options, Request, takes_options
from peft_posthoc.extraction.row import left_out
from peft_posthoc.extraction.series import Series
from peft_posthoc.extraction.spool import Spool
from peft_posthoc.extraction.work import factor_pairs
from peft_posthoc.linalg.spectrum import RankRule, in_advance
from peft_posthoc.linalg.svd import cost
from peft_posthoc.ranks.rules import Rank, is_value, several
from peft_posthoc.sources import Source, sides
from peft_posthoc.text import asked, percent, surface


@takes_options
def extract(
    base: Source,
    tuned: Source,
    rank: Rank | Mapping[str, Rank] | Request = 32,
    *,
    out: str | PathLike[str] | None = None,
    processes: Processes = ALONE,
    progress: bool = False,
    keep_factors: bool = True,
    **options: Unpack[Options],
) -> Adapter:
    """Extract a LoRA adapter from a base model and a full fine-tune of it (PHLoRA, arXiv 2509.10971).

    Args:
        base: The model before: a folder, a file, a hub id, a module or a state dict.
        tuned: The same model after any kind of full fine-tuning.
        rank: How many singular triplets of each weight's delta to keep: an int is a rank, a float in (0, 1] the share
            of the delta's energy, `"auto"` what stands out of its noise, a `RankRule` anything else; or a `budget` of
            all layers together. Or one of these, but for a budget, by the name of the weight: weights that have none
            are not carried. Or a `Request`, which holds the options too.
        out: Where the adapter will be saved. Finished layers are kept beside it until it is: an interrupted run with
            the same inputs and options goes on from there, but for a rule that is a function.
        processes: Those that share the work, as `Processes.from_environment()` finds them.
        progress: Show a progress bar on stderr.
        keep_factors: Without them the adapter can be looked at, not saved: of every layer only the spectrum is held.
        **options: As `Options` has them.

    Returns:
        The adapter, with its report.

    Warns:
        LeftOutWarning: A hundredth of the fine-tune's energy, or more, is not in the adapter.

    Raises:
        AdapterError: It holds less than `min_energy` of the whole fine-tune.
        CheckpointError: A checkpoint cannot be read, or holds NaN or infinity.
        MismatchError: The two are not states of one model.
        NothingToCarryError: Nothing changed that LoRA can carry.
        ShareDone: This is not the first of several processes, and its share is done.
        ValueError: An argument makes no sense.
    """
    if out is not None and not keep_factors:
        raise ValueError("`extract(keep_factors=False)` makes nothing to save: it takes no `out`.")
    place = None if out is None else Path(out).absolute()
    if place is not None:
        _check_not_read(place, base, tuned)
    request = Request.of(rank, **options)
    prepared = prepare(base, tuned, request)
    before, after, plan, rules = prepared.base, prepared.tuned, prepared.plan, prepared.rules
    check(prepared, out)
    spool, nothing_kept = None, _why_nothing_is_kept(prepared, place)
    if nothing_kept:
        if processes.size > 1:
            raise ValueError(f"Several processes hand over what they did beside the adapter, and {nothing_kept}.")
    elif place is not None:
        carried = {name: [place.module for place in places] for name, places in plan.carried.items()}
        spool = Spool(place, [*(model.identity for model in prepared.models), prepared.options, carried])
        if processes.size > 1:
            spool.patience = 0.0
    try:
        outcomes = _outcomes(
            before,
            after,
            plan,
            rules,
            spool,
            processes,
            served=prepared.served,
            exact=request.options["exact"],
            device=prepared.device,
            progress=progress,
            keep_factors=keep_factors,
        )
        adapter = prepared.adapter(outcomes, tuned_name=request.options["tuned_name"])
        adapter = prepared.settle(adapter)
        if (least := request.options["min_energy"]) is not None:
            _check_energy(adapter, request.rank, least)
        if keep_factors and surface() == "python":
            _warn_of_losses(adapter)
        return adapter
    except KeyboardInterrupt as interrupt:
        if spool is not None and len(spool):
            interrupt.add_note(
                f"{len(spool)} of {len(plan.headers)} weights are done and kept in `{spool.folder}`. "
                "The same command goes on from there."
            )
        elif nothing_kept and place is not None:
            interrupt.add_note(f"Nothing is kept of what is done: {nothing_kept}.")
        raise
    except (PosthocError, ValueError) as error:
        if spool is not None and not isinstance(error, ShareDone):
            spool.remove()
        raise


def _check_energy(adapter: Adapter, rank: object, least: float) -> None:
    """See that the adapter, or each of several, holds enough of the whole fine-tune.

    Raises:
        AdapterError: One does not.
    """
    for one in Series.of(adapter, rank).adapters.values() if isinstance(rank, several) else [adapter]:
        totals = one.report.totals
        if totals.energy_of_all < least:
            lost = "; ".join(f"{percent(share)}: {why}" for why, share in _losses(one))
            raise AdapterError(
                f"At rank {totals.rank} the adapter holds {totals.of_all} of the whole fine-tune's energy, less than "
                f"`{asked('min_energy', least)}`, and is not written. Its weights hold {percent(totals.energy)} of "
                f"their deltas'. Left out is {lost or 'nothing else'}."
            )


def _warn_of_losses(adapter: Adapter) -> None:
    if losses := [f"{percent(share)}: {why}" for why, share in _losses(adapter) if share >= MATERIAL]:
        text = f"Of the fine-tune's energy the adapter leaves out {'; '.join(losses)}. Its `report` has every tensor."
        warnings.warn(text, LeftOutWarning, stacklevel=3)


def _losses(adapter: Adapter) -> list[tuple[str, float]]:
    """What is left out, by reason in the words of whoever asked: its share of the whole fine-tune, largest first."""
    fates = adapter.plan.left_out
    losses = [(fates[rows[0].weight].hint, share) for rows, share in left_out(adapter.report.rows).values()]
    return sorted(losses, key=lambda loss: -loss[1])


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
        for part in (source, *(sides(source) or ())):
            if out.exists() and Path(part).exists() and out.samefile(part):
                raise AdapterError(f"`{part}` is what the adapter is made from. Choose another folder for the adapter.")


def _outcomes(
    base: Checkpoint,
    tuned: Checkpoint,
    plan: Plan,
    rules: Mapping[str, RankRule],
    spool: Spool | None,
    processes: Processes,
    *,
    served: Checkpoint | None,
    exact: bool,
    device: torch.device,
    progress: bool,
    keep_factors: bool,
) -> list[Outcome]:
    """What is known of every weight: from an earlier run, from this process, and from the others.

    Raises:
        ShareDone: This is not the first of several processes.
    """
    sizes = {
        name: sum(side.headers[name].bytes for side in (base, tuned) if name in side.headers) for name in plan.headers
    }
    share = processes.share({name: _cost(name, base, tuned, plan, rules, exact=exact) for name in plan.headers})
    if tuned.sequential:
        share = [*in_stored_order(tuned), *(name for name in plan.headers if name not in tuned.headers)]
    outcomes = spool.outcomes(share) if spool else []
    done = {outcome.weight for outcome in outcomes}
    mine = [name for name in share if name not in done]
    largest = max(header.bytes for header in plan.headers.values())
    bar = tqdm(
        total=sum(sizes[name] for name in share),
        initial=sum(sizes[name] for name in done),
        unit="B",
        unit_scale=True,
        desc="Extracting",
        disable=not progress or processes.rank > 0,
    )
    with (
        bar,
        read_pairs(base, tuned, mine, served=served, only=plan.carried) as pairs,
        factor_pairs(pairs, plan.fates, largest=largest, exact=exact, device=device) as found,
    ):
        for outcome in found:
            if isinstance(outcome, Layer) and not keep_factors:
                outcome = outcome.without_factors()
            outcomes.append(outcome)
            if spool is not None:
                spool.put(outcome)
            bar.update(sizes[outcome.weight])
    if processes.rank > 0:
        raise ShareDone("This process has done its share; the first one has the adapter.")
    while spool is not None and len(outcomes) < len(plan.headers):
        if spool.was_overtaken():
            raise AdapterError("Another run has written its adapter to the same folder. Give each run one of its own.")
        # Should another process die, the launcher ends this one too.
        time.sleep(0.05)
        outcomes = spool.outcomes(plan.headers) if len(spool) >= len(plan.headers) else outcomes
    return outcomes


def _cost(
    name: str, base: Checkpoint, tuned: Checkpoint, plan: Plan, rules: Mapping[str, RankRule], *, exact: bool
) -> float:
    """About how much work a weight is, as `svd.cost` counts it."""
    # Reading a value, subtracting and taking norms take as long as a thousand multiplications in a product.
    values = max(math.prod(side.headers[name].shape) for side in (base, tuned) if name in side.headers)
    if name not in plan.carried:
        return 1e3 * values
    slot, rule = plan.slots[plan.carried[name][0].module], rules[name]
    return 1e3 * values + cost(slot.m, slot.n, in_advance(rule) or 32, exact=exact)


@contextlib.contextmanager
def read_pairs(
    base: Checkpoint,
    tuned: Checkpoint,
    names: Iterable[str],
    *,
    served: Checkpoint | None = None,
    only: Container[str] = (),
) -> Iterator[Iterator[Pair]]:
    """The tensors of these names in both checkpoints, one pair at a time, the next one read ahead.

    Of those in `only`, what the served base has too, and the steps of the grids of what is quantised.

    They are read in a thread of their own: safetensors makes an unrelated error of a Ctrl-C that comes while it reads,
    and Ctrl-C only ever comes to the main thread.
    """

    def read(name: str) -> Pair:
        before, after = (side.read(name) if name in side.headers else None for side in (base, tuned))
        pair = Pair(name, before, after)
        if name not in only:
            return pair
        return pair._replace(
            served=None if served is None else served.read(name), steps=(base.steps(name), tuned.steps(name))
        )

    # Codes are decoded there, in many short steps: on more cores each waits for threads that factor meanwhile, and all
    # takes up to ten times as long.
    with Workers(waiting=1, torch_threads=1) as reader:
        yield reader.map(read, names)
