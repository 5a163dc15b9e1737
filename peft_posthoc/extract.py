"""From two checkpoints to an adapter: the one loop over all weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from tqdm import tqdm

from peft_posthoc.adapter import Adapter
from peft_posthoc.checkpoint import Checkpoint, Source, open_pair
from peft_posthoc.factor import Layer, Pair, Skipped, factor_pairs
from peft_posthoc.plan import Choice, Plan, by_flags, make_plan
from peft_posthoc.rank import RankRule, as_rule, describe


def extract(
    base: Source,
    tuned: Source,
    rank: int | float | RankRule = 32,
    *,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    embeddings: bool = False,
    head: bool = False,
    choose: Choice | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    exact: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Adapter:
    """Extract a LoRA adapter from a base model and a full fine-tune of it (PHLoRA, arXiv 2509.10971).

    Args:
        base: The model before: a folder, a hub id, a module or a state dict.
        tuned: The same model after any kind of full fine-tuning.
        rank: How many singular triplets of each weight's delta to keep: an int is a rank, a float in (0, 1] the share
            of the delta's energy, a `RankRule` anything else.
        base_revision: Branch, tag or commit, where `base` is a hub id.
        tuned_revision: The same for `tuned`.
        include: Regular expressions over weight names; only what one of them is found in is carried.
        exclude: The same; what one of them is found in is not carried.
        embeddings: Carry token embeddings too.
        head: Carry the output head (`lm_head`) too.
        choose: Which modules to adapt, in place of `embeddings` and `head`.
        rank_pattern: Ranks by hand: a regular expression that a module's name ends in, and its rank, as in PEFT.
        exact: Use LAPACK's full SVD for every weight.
        device: Where to factor: `cpu`, `cuda`, `cuda:1`, ..., or `auto`.
        dtype: Of the saved factors; by default the tuned checkpoint's.
        progress: Show a progress bar on stderr.

    Returns:
        The adapter, with its report.

    Raises:
        CheckpointError: A checkpoint cannot be read, or holds NaN or infinity.
        MismatchError: The two are not states of one model.
        NothingToCarryError: Nothing changed that LoRA can carry.
        ValueError: An argument makes no sense.
    """
    rule = as_rule(rank)
    where = pick_device(device)
    before, after = open_pair(base, tuned, base_revision=base_revision, tuned_revision=tuned_revision)
    choice = choose or by_flags(embeddings=embeddings, head=head)
    plan = make_plan(before, after, include=include, exclude=exclude, choose=choice)
    rules = rules_of(plan, rule, rank_pattern or {})
    total = sum(header.bytes for header in (*before.headers.values(), *after.headers.values()))
    outcomes: list[Layer | Skipped] = []
    with tqdm(total=total, unit="B", unit_scale=True, desc="Extracting", disable=not progress) as bar:
        pairs = read_pairs(before, after, plan)
        for outcome in factor_pairs(pairs, plan, rules, exact=exact, device=where):
            outcomes.append(outcome)
            both = [side.headers[outcome.weight] for side in (before, after) if outcome.weight in side.headers]
            bar.update(sum(header.bytes for header in both))
    options = {
        "rule": describe(rule),
        "rank_pattern": dict(rank_pattern or {}),
        "include": list(include),
        "exclude": list(exclude),
        "embeddings": embeddings,
        "head": head,
        "exact": exact,
        "device": where.type,
    }
    return Adapter.of(before, after, plan, outcomes, dtype=dtype, options=options)


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is the first GPU if there is one.

    Raises:
        ValueError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"There is no device `{name}` here. Use `cpu`, or `auto` for a GPU if there is one."
        ) from error
    return device


def rules_of(plan: Plan, rule: RankRule, rank_pattern: Mapping[str, int]) -> dict[str, RankRule]:
    """The rank rule of every carried weight: `rule`, but where a pattern gives its module a rank by hand."""
    own = {pattern: as_rule(rank) for pattern, rank in rank_pattern.items()}

    def of(module: str) -> RankRule:
        # As PEFT matches the keys of `rank_pattern`: the first that the end of the name is.
        return next((r for pattern, r in own.items() if re.match(rf"(.*\.)?({pattern})$", module)), rule)

    return {weight: of(places[0].module) for weight, places in plan.carried.items()}


def read_pairs(base: Checkpoint, tuned: Checkpoint, plan: Plan) -> Iterator[Pair]:
    """Every tensor of both checkpoints, one pair at a time."""
    for name in (*plan.carried, *plan.left_out):
        yield Pair(
            name,
            base.read(name) if name in base.headers else None,
            tuned.read(name) if name in tuned.headers else None,
        )
