"""What an extraction will do: every choice is made, and every mistake found, before a tensor is read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from peft_posthoc.checkpoints.beside import files_of_text
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.view import stored_names
from peft_posthoc.compute.device import pick_device
from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.forms.arriving import arriving
from peft_posthoc.extraction.forms.lay_out import lay_out
from peft_posthoc.extraction.forms.layout import FileLayout, Form
from peft_posthoc.extraction.forms.whole import keeping
from peft_posthoc.extraction.outcomes import Outcome
from peft_posthoc.extraction.plan import Plan, by_flags, everything, make_plan
from peft_posthoc.extraction.reasons import CODED, Reason
from peft_posthoc.extraction.request import Request
from peft_posthoc.extraction.sizing import FoundSizing, PlanSizing
from peft_posthoc.linalg.spectrum import RankRule, in_advance
from peft_posthoc.lineage.doubts import doubts
from peft_posthoc.models.decoders import is_plain_decoder
from peft_posthoc.models.find import model_of
from peft_posthoc.models.layout import GUESSED, Layout
from peft_posthoc.models.part import is_rest
from peft_posthoc.pairing.difference import Difference
from peft_posthoc.pairing.differences import differences
from peft_posthoc.pairing.pair import match, served_as
from peft_posthoc.patterns import PatternError, asked_for, first_matches
from peft_posthoc.ranks.rules import Allocation, Rank, describe, each
from peft_posthoc.sources import Source, open_checkpoint, open_pair
from peft_posthoc.text import asked, shorten

# Options that the report, and the key under which finished layers are kept, have in another way: which models, as the
# identity of the two; what is chosen by Python, as what is carried; how factors are saved; and what changes no adapter.
# A new option is in both.
_MODELS = {"base_revision", "tuned_revision", "tuned_name", "for_base"}
_TOLD_OTHERWISE = {
    *_MODELS,
    "choose",
    "leave_out",
    "experts",
    "device",
    "dtype",
    "min_energy",
    "with_tokenizer",
    "stream",
    "unrelated",
}


@dataclass(frozen=True)
class Prepared:
    """Two checkpoints, and what is to be done with each of their tensors."""

    base: Checkpoint
    tuned: Checkpoint
    plan: Plan
    form: Form
    device: torch.device
    dtype: torch.dtype
    """Of the saved factors."""
    options: Mapping[str, Any]
    """What was asked for, as plain JSON values."""
    notes: tuple[str, ...]
    """What was decided to compare the two: of their names, and the like."""
    allocation: Allocation | None = None
    """What shares ranks out among all layers, once they are factored as far as the rules say."""
    by_hand: frozenset[str] = frozenset()
    """Weights whose rank it does not change."""
    differences: tuple[Difference, ...] = ()
    """Of configuration and tokenizer: what no adapter carries."""
    beside: Mapping[str, Path] = field(default_factory=dict)
    """By name: files of the tuned model that are copied beside the adapter."""
    served: Checkpoint | None = None
    """The base that the adapter is served on, where that is another."""

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """All that is read."""
        return (self.base, self.tuned) if self.served is None else (self.base, self.tuned, self.served)

    @cached_property
    def rules(self) -> dict[str, RankRule]:
        """By carried weight."""
        return {name: fate.rule for name, fate in self.plan.factored.items() if fate.rule is not None}

    def settle(self, adapter: Adapter) -> Adapter:
        """The adapter, at the ranks that are to be kept of what was factored.

        Raises:
            ValueError: None are within what was asked for.
        """
        if self.allocation is None:
            return adapter
        told = describe(self.allocation)
        return adapter.cut(self.allocation.choose(FoundSizing(adapter, told), self.by_hand), told)

    def adapter(self, outcomes: Iterable[Outcome], *, tuned_name: str | None = None) -> Adapter:
        """The adapter, from what is known of every tensor.

        Raises:
            NothingToCarryError: No layer was factored.
        """
        return Adapter.of(
            self.base,
            self.tuned,
            self.plan,
            outcomes,
            tuned_name=tuned_name,
            dtype=self.dtype,
            options=self.options,
            form=self.form,
            notes=self.notes,
            differences=self.differences,
            beside=self.beside,
            served=self.served,
        )


def prepare(base: Source, tuned: Source, request: Request) -> Prepared:
    """Open both checkpoints and decide what becomes of every tensor.

    Args:
        base: As in `extract`.
        tuned: As in `extract`.
        request: What is asked for.

    Raises:
        CheckpointError: A checkpoint cannot be read.
        MismatchError: The two are not states of one model.
        NothingToCarryError: No weight can be carried.
        ValueError: An argument makes no sense.
    """
    options, rank = request.options, request.rank
    form = options["form"]
    include, exclude, rename = (tuple(options[name]) for name in ("include", "exclude", "rename"))
    kind: Form = form
    where = pick_device(options["device"])
    mixture = options["experts"] or ("fused" if form == "peft" else "none")
    opened = open_pair(
        base,
        tuned,
        base_revision=options["base_revision"],
        tuned_revision=options["tuned_revision"],
        stream=options["stream"],
    )
    before, after, layout, whole, notes = match(
        *opened,
        rules=rename,
        serve_as=options["serve_as"],
        experts=mixture,
        vocab=options["vocab"],
        of_tuned=form == "peft",
    )
    notes = (*notes, *filter(None, (getattr(side, "doubt", None) for side in opened)))
    leave_out = _as_compared(options["leave_out"] or {}, before, after)
    carry_experts = mixture != "none"
    flags = by_flags(
        embeddings=options["embeddings"],
        head=options["head"],
        conv=options["conv"] or options["conv_rank"] is not None,
        experts=carry_experts,
    )
    if form == "peft":
        flags = everything if carry_experts else by_flags(embeddings=True, head=True, conv=True)
    plan = make_plan(
        before,
        after,
        include=include,
        exclude=exclude,
        choose=options["choose"] or flags,
        leave_out=leave_out,
        layout=layout,
        whole=whole,
    )
    served = None
    if options["for_base"] is not None:
        served = served_as(
            open_checkpoint(options["for_base"], role="served base", stream=options["stream"]),
            opened[0],
            {name: before.headers[name].shape for name in plan.carried},
            rules=rename,
            serve_as=options["serve_as"],
            experts=mixture,
        )
    named = options["dtype"]
    dtype = getattr(torch, str(named), None) if named else after.headers[next(iter(plan.carried))].dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"Factors are saved in a floating type. Got `dtype={named or dtype}`.")
    allocation = rank if isinstance(rank, Allocation) else None
    if isinstance(rank, Allocation):
        rank = rank.bounds(PlanSizing(plan, dtype, kind))
    rules = rules_of(plan, rank, options["rank_pattern"] or {}, options["conv_rank"])
    by_hand = () if allocation is None else (name for name, rule in rules.items() if cast(Any, rank)[name] is not rule)
    plan = plan.ruled(rules)
    never = (*CODED, Reason.BESIDE_MODEL)
    but = {*leave_out, *(name for name, fate in plan.left_out.items() if fate.reason in never)}
    names = _may_be_kept(before, after, plan.layout, include, exclude, but=but) if kind == "peft" else ()
    # Of experts taken apart much is for serving engines only, and of common decoders PEFT loads all.
    known = mixture != "per-expert" and not any(map(is_plain_decoder, (before, after)))
    models = (after, before) if kind == "peft" else (before, after)
    plan, refused = arriving(
        plan,
        lambda: model_of(plan.layout, *models) if known else None,
        lambda plan: _file_of(plan, kind, dtype),
        lambda plan, but: keeping(plan, [name for name in names if name not in but]) if kind == "peft" else plan,
    )
    if refused:
        notes = (*notes, f"The installed PEFT does not load this adapter: {shorten(refused, 300)}")
    notes = (*notes, *doubts(*opened))
    beside = files_of_text(opened[1]) if options["with_tokenizer"] else {}
    if options["with_tokenizer"] and not beside:
        notes = (*notes, f"There is no tokenizer beside `{opened[1].label}`: none is copied.")
    told = {
        "rule": _told(rules) if allocation is None else describe(allocation),
        **{name: value for name, value in options.items() if name not in _TOLD_OTHERWISE},
        "experts": mixture,
        "device": where.type,
    }
    return Prepared(
        before,
        after,
        plan,
        kind,
        where,
        dtype,
        told,
        notes,
        allocation,
        frozenset(by_hand),
        differences(*opened),
        beside,
        served,
    )


def _file_of(plan: Plan, form: Form, dtype: torch.dtype) -> FileLayout:
    """The layout of the file, if everything has changed."""
    rules = {name: in_advance(fate.rule) if fate.rule else None for name, fate in plan.factored.items()}
    ranks = {name: min(rank or 1, *plan.slot(name)[1:]) for name, rank in rules.items()}
    return lay_out(form, plan, ranks, plan.kept.keys(), dtype)


def _as_compared(leave_out: Mapping[str, str], *sides: Checkpoint) -> dict[str, str]:
    """What is left out by a name of its own, by the name that it is compared under."""
    return {
        name: leave_out[own]
        for side in sides
        for name in side.headers
        for own in stored_names(side, name)
        if own in leave_out
    }


def _may_be_kept(
    base: Checkpoint,
    tuned: Checkpoint,
    layout: Layout,
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    but: Collection[str],
) -> list[str]:
    """The tensors that a form may keep without factors: they are chosen, and the same in base, or new in tuned."""

    def fits(name: str) -> bool:
        if name in base.headers:
            return base.headers[name].shape == tuned.headers[name].shape
        # A new head, whose module the tuned model's class has. What is numbered is a layer that the base lacks.
        module = layout.module_of(name)
        numbered = any(part.isdigit() for part in module.split("."))
        # Of common decoders no class is asked: what else is in their file is no module of theirs.
        known = layout.classes.get(module) or (module == layout.head and layout.origin != GUESSED)
        return bool(known) and not is_rest(name) and not numbered

    names = [name for name in tuned.headers if fits(name) and name not in but]
    wanted, unwanted = (
        {name for pattern in patterns for name in asked_for(pattern, names, option)}
        for patterns, option in ((include, "include"), (exclude, "exclude"))
    )
    return [name for name in names if (not include or name in wanted) and name not in unwanted]


def rules_of(
    plan: Plan, rank: Rank | Mapping[str, Rank], rank_pattern: Mapping[str, int], conv_rank: int | None = None
) -> dict[str, RankRule]:
    """The rank rule of every carried weight: `rank`, but where a pattern gives its module a rank by hand.

    Args:
        plan: What is carried.
        rank: Of all, or by weight.
        rank_pattern: By a pattern of modules' names.
        conv_rank: Of the convolutions that no pattern gives one.

    Raises:
        ValueError: A rank makes no sense, or is given for a weight that cannot be carried.
    """
    given = {name: each(one) for name, one in rank.items()} if isinstance(rank, Mapping) else None
    rule = each(rank) if not isinstance(rank, Mapping) else None
    for name in given or ():
        if name not in plan.carried:
            why = plan.left_out[name].hint if name in plan.left_out else "neither checkpoint has it"
            raise ValueError(f"A rank is given for `{name}`, which cannot be carried: {why}.")
    own = {pattern: each(one) for pattern, one in rank_pattern.items()}
    convolutions = None if conv_rank is None else each(conv_rank)
    modules = {weight: places[0].parameter for weight, places in plan.carried.items()}
    try:
        by_hand = first_matches(own, dict.fromkeys(modules.values()))
    except PatternError as error:
        raise ValueError(f"`{asked('rank_pattern', None)}`: {error}.") from error

    # One that a pattern before it hides has met its modules.
    if idle := [each for each in own if each not in by_hand.values() and not first_matches([each], modules.values())]:
        raise ValueError(
            f"`{idle[0]}` in `{asked('rank_pattern', None)}` ends the name of no module that is carried. Names look "
            f"like `{next(iter(modules.values()))}`."
        )

    def of(weight: str, module: str) -> RankRule | None:
        if module in by_hand:
            return own[by_hand[module]]
        if convolutions is not None and plan.carried[weight][0].role == "convolution":
            return convolutions
        return rule if given is None else given.get(weight)

    found = {weight: of(weight, module) for weight, module in modules.items()}
    return {weight: one for weight, one in found.items() if one is not None}


def _told(rules: Mapping[str, RankRule]) -> str | dict[str, str]:
    """The rules as the report tells them: one for all, or each by its weight."""
    told = {weight: describe(rule) for weight, rule in rules.items()}
    return told if len(set(told.values())) > 1 else next(iter(told.values()))
