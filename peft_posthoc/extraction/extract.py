"""From two checkpoints to an adapter: the one loop over all weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Unpack

from peft_posthoc.checkpoints.view import in_stored_order
from peft_posthoc.errors import LeftOutWarning, ShareDone
from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.begun import Begun, begin, losses
from peft_posthoc.extraction.estimate import costs
from peft_posthoc.extraction.outcomes import Layer, Outcome
from peft_posthoc.extraction.processes import ALONE, Processes, told_by_first
from peft_posthoc.extraction.read import read_pairs
from peft_posthoc.extraction.report import MATERIAL
from peft_posthoc.extraction.request import Options, Request, takes_options
from peft_posthoc.extraction.work import factor_pairs
from peft_posthoc.progress import progress_bar
from peft_posthoc.ranks.rules import Rank
from peft_posthoc.sources import Source
from peft_posthoc.text import percent, surface


@takes_options
def extract(
    base: Source,
    tuned: Source,
    rank: Rank | Mapping[str, Rank] | Request = 32,
    *,
    out: str | PathLike[str] | None = None,
    processes: Processes = ALONE,
    everywhere: bool = False,
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
        everywhere: Give the adapter to each of them, and not to the first alone.
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
        ShareDone: This is not the first of several processes, and its share is done, or the first tells what is wrong.
        ValueError: An argument makes no sense.
    """
    if out is not None and not keep_factors:
        raise ValueError("`extract(keep_factors=False)` makes nothing to save: it takes no `out`.")
    begun = begin(base, tuned, Request.of(rank, **options), out=out, shared=processes.size > 1)
    with begun.kept():
        outcomes = _outcomes(begun, processes, progress=progress, keep_factors=keep_factors)
        if processes.rank and not everywhere:
            raise ShareDone("This process has done its share; the first one has the adapter.")
        with told_by_first(processes):
            adapter = begun.finish(begun.all(outcomes))
        if keep_factors and surface() == "python":
            _warn_of_losses(adapter)
        return adapter


def _warn_of_losses(adapter: Adapter) -> None:
    if lost := [f"{percent(share)}: {why}" for why, share in losses(adapter) if share >= MATERIAL]:
        text = f"Of the fine-tune's energy the adapter leaves out {'; '.join(lost)}. Its `report` has every tensor."
        warnings.warn(text, LeftOutWarning, stacklevel=3)


def _outcomes(begun: Begun, processes: Processes, *, progress: bool, keep_factors: bool) -> list[Outcome]:
    """What is known of this process' share of the weights: from an earlier run, and from this one."""
    prepared, plan, spool = begun.prepared, begun.prepared.plan, begun.spool
    share = processes.share(costs(prepared))
    if prepared.tuned.sequential:
        share = [
            *in_stored_order(prepared.tuned),
            *(name for name in begun.names if name not in prepared.tuned.headers),
        ]
    outcomes = spool.outcomes(share) if spool else []
    done = {outcome.weight for outcome in outcomes}
    mine = [name for name in share if name not in done]
    bar = progress_bar(
        total=sum(map(begun.bytes, share)),
        initial=sum(map(begun.bytes, done)),
        unit="B",
        unit_scale=True,
        desc="Extracting",
        progress=progress and processes.rank == 0,
    )
    exact = begun.request.options["exact"]
    of_both = (prepared.base, prepared.tuned, mine)
    with (
        bar,
        read_pairs(*of_both, served=prepared.served, only=plan.carried, kin=begun.kin) as pairs,
        factor_pairs(pairs, plan.fates, largest=begun.largest, exact=exact, device=prepared.device) as found,
    ):
        for outcome in found:
            if isinstance(outcome, Layer) and not keep_factors:
                outcome = outcome.without_factors()
            outcomes.append(outcome)
            if spool is not None:
                spool.put(outcome)
            bar.update(begun.bytes(outcome.weight))
    return outcomes
