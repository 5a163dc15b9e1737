"""What will be carried and what not, and why: decided from headers alone, before a tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.errors import CheckpointError, MismatchError, NothingToCarryError
from peft_posthoc.models.find import layout_of
from peft_posthoc.models.layout import Layout, Place, Role
from peft_posthoc.models.slots import Slot, slots_of
from peft_posthoc.pairing.vocabulary import resized, way_out
from peft_posthoc.patterns import asked_for

ONLY_IN_BASE = "only in base"
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)

Choice = Callable[[Sequence[Place]], "tuple[list[Place], str]"]
"""Of the places a weight lives in, those to adapt; and, if none, the reason."""


class Keep(NamedTuple):
    """How a tensor without factors is kept."""

    modules: tuple[str, ...]
    """Those that are kept whole for it, or the one with factors whose bias it is."""
    names: tuple[str, ...]
    """In the model, that it has in these modules."""
    as_bias: bool
    """As the bias of a module with factors: its difference; otherwise the tuned tensor itself."""


@dataclass(frozen=True)
class Plan:
    """Every tensor of both checkpoints is either carried or left out."""

    layout: Layout
    carried: Mapping[str, tuple[Place, ...]]
    """By weight: the modules that get its factors; the first one's kind says how it becomes a matrix."""
    left_out: Mapping[str, str]
    """By weight: the reason."""
    slots: Mapping[str, Slot]
    """Every module of the base that could hold factors."""
    headers: Mapping[str, Header]
    """Of every tensor, the tuned one's where both have it."""
    kept: Mapping[str, Keep] = field(default_factory=dict)
    """By weight: what has no factors but is in the file all the same."""
    whole: frozenset[str] = frozenset()
    """Weights that have no factors though their modules could hold some: they have other rows than the base's."""

    def only(self, names: Collection[str], reason: str) -> Plan:
        """The same plan, of which only these weights are carried.

        Raises:
            NothingToCarryError: None of them is.
        """
        others = [name for name in self.carried if name not in names]
        if len(others) == len(self.carried):
            raise NothingToCarryError(f"No weight is left to carry: {reason}.")
        carried = {name: places for name, places in self.carried.items() if name in names}
        return replace(self, carried=carried, left_out={**self.left_out, **dict.fromkeys(others, reason)})

    def slot(self, name: str) -> Slot:
        """The matrix that a carried weight is."""
        return self.slots[self.carried[name][0].module]

    def reason(self, name: str) -> str:
        """Why a weight is not carried."""
        return self.left_out.get(name, "neither checkpoint has it")


_FLAGS: Mapping[Role, str] = {
    "convolution": "--conv",
    "embedding": "--embeddings",
    "expert": "--experts",
    "head": "--head",
}


def by_flags(*, embeddings: bool = False, head: bool = False, conv: bool = False, experts: bool = False) -> Choice:
    """Carry all layers, and token embeddings, the head, convolutions and experts where asked for.

    Where the two are tied they are one weight, and either flag carries it in both places: half of it is no model.
    """
    asked = {"embedding": embeddings, "head": head, "convolution": conv, "expert": experts}
    wanted = {"layer", *(role for role, flag in asked.items() if flag)}

    def choose(places: Sequence[Place]) -> tuple[list[Place], str]:
        roles = {place.role for place in places}
        if places and places[0].kind.stacked and not places[0].module.endswith("]"):
            return [], "bias of experts (carried with --form peft)"
        if roles & wanted:
            return list(places), ""
        flags = " or ".join(_FLAGS[role] for role in sorted(roles))
        return [], f"{' and '.join(sorted(roles))} (carried with {flags})"

    return choose


def everything(places: Sequence[Place]) -> tuple[list[Place], str]:
    """Carry all that can be carried, embeddings and head too."""
    return list(places), ""


def make_plan(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    choose: Choice | None = None,
    leave_out: Mapping[str, str] | None = None,
    layout: Layout | None = None,
    whole: Collection[str] = (),
) -> Plan:
    """Decide for every tensor of both checkpoints whether and where it is carried.

    Args:
        base: The checkpoint before.
        tuned: The checkpoint after.
        include: Regular expressions, searched in weight names: of the weights that can be carried, only these.
        exclude: The same: not these.
        choose: Which modules to adapt; `by_flags()` if None.
        leave_out: By name, tensors that are not carried, and why.
        layout: Of both; asked of them if None.
        whole: By name, tensors that no factors lead to.

    Raises:
        MismatchError: The two are not states of one model; every tensor whose shapes differ is named.
        NothingToCarryError: No weight is left to carry.
        ValueError: A regular expression is malformed or matches nothing.
    """
    _plain(base, "base")
    _plain(tuned, "tuned")
    _same_model(base, tuned)
    names = list(dict.fromkeys([*base.headers, *tuned.headers]))
    included = _matches(include, names, "include")
    excluded = _matches(exclude, names, "exclude")
    told = leave_out or {}
    choose = choose or by_flags()
    layout = (layout or layout_of(base, tuned)).without_ties(set(tuned.headers) - set(base.headers))
    _same_shapes(base, tuned, layout, {*(excluded or ()), *told})
    carried: dict[str, tuple[Place, ...]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if name in told:
            left_out[name] = told[name]
            continue
        places, reason = _decide(name, base.headers, tuned.headers, layout, choose)
        if name in whole:
            places, reason = [], "other rows than the base's (--vocab extend)"
        if places and ((included is not None and name not in included) or (excluded and name in excluded)):
            places, reason = [], "not chosen (--include/--exclude)"
        if places:
            carried[name] = tuple(places)
        else:
            left_out[name] = reason
    if not carried:
        reasons = ", ".join(sorted(set(left_out.values())))
        raise NothingToCarryError(f"No weight of `{base.label}` and `{tuned.label}` can be carried: {reasons}.")
    return Plan(
        layout,
        carried,
        left_out,
        slots_of(base.headers, layout),
        {**base.headers, **tuned.headers},
        whole=frozenset(whole),
    )


def _plain(checkpoint: Checkpoint, role: str) -> None:
    packed = [name for name, header in checkpoint.headers.items() if header.dtype in _EIGHT_BITS]
    if packed or (checkpoint.config or {}).get("quantization_config"):
        what = f"`{packed[0]}` is {checkpoint.headers[packed[0]].dtype}" if packed else "its config.json says so"
        raise CheckpointError(
            f"The {role} `{checkpoint.label}` is quantized ({what}); its numbers need their scales. Give "
            "the checkpoint it was made from, or dequantize it first."
        )


def _same_model(base: Checkpoint, tuned: Checkpoint) -> None:
    configs = [checkpoint.config or {} for checkpoint in (base, tuned)]
    kinds = [config.get("model_type") for config in configs]
    # A model with images may be compared with its language model.
    parts = [{config.get("model_type"), (config.get("text_config") or {}).get("model_type")} for config in configs]
    if all(kinds) and not (parts[0] & parts[1]) - {None}:
        raise MismatchError(
            f"Two different architectures: `{base.label}` is a {kinds[0]}, `{tuned.label}` a {kinds[1]}. A delta needs "
            "the base that the fine-tune started from."
        )
    if not set(base.headers) & set(tuned.headers):
        raise MismatchError(
            f"`{base.label}` and `{tuned.label}` have no tensor name in common (`{next(iter(base.headers))}` against "
            f"`{next(iter(tuned.headers))}`): they are not two states of one model."
        )


def _same_shapes(base: Checkpoint, tuned: Checkpoint, layout: Layout, excluded: set[str]) -> None:
    before, after = base.headers, tuned.headers
    names = [n for n in before if n in after and before[n].shape != after[n].shape and n not in excluded]
    rows = resized(base, tuned, layout)
    if names and all(name in rows for name in names):
        raise MismatchError(way_out(names, rows[names[0]]))
    wrong = [f"`{name}` {list(before[name].shape)} against {list(after[name].shape)}" for name in names]
    if wrong:
        raise MismatchError(
            f"{len(wrong)} tensors have other shapes in base and tuned: {'; '.join(wrong)}. Give the base that the "
            "fine-tune started from, or leave these out with `--exclude`."
        )


def _matches(patterns: Iterable[str], names: Sequence[str], option: str) -> set[str] | None:
    """The names that any pattern is found in; None without patterns."""
    found: set[str] | None = None
    for pattern in patterns:
        hits = asked_for(pattern, names, option)
        if not hits:
            raise ValueError(
                f"`--{option} {pattern}` matches no weight name. Names look like `{names[len(names) // 2]}`."
            )
        found = (found or set()) | hits
    return found


def _decide(
    name: str, base: Mapping[str, Header], tuned: Mapping[str, Header], layout: Layout, choose: Choice
) -> tuple[list[Place], str]:
    if name not in tuned:
        return [], ONLY_IN_BASE
    if name not in base:
        return [], "only in tuned"
    header = base[name]
    if header.shape != tuned[name].shape:
        return [], "shapes differ (--exclude)"
    if not (header.dtype.is_floating_point and tuned[name].dtype.is_floating_point):
        return [], "not a floating-point tensor"
    if name.endswith(".bias") or name == "bias":
        return [], "bias (LoRA has no portable form for it)"
    if 0 in header.shape:
        return [], "holds no values"
    if len(header.shape) < 2:
        return [], "norm or other vector (LoRA has no form for it)"
    places = layout.places(name)
    if places and places[0].kind.size(header.shape) is not None:
        return choose(places)
    if layout.of_experts(name):
        return [], f"expert (carried with {_FLAGS['expert']})"
    module = layout.module_of(name)
    if module in layout.mistaken:
        return [], "layer beside experts (PEFT drops its factors; carried with --experts per-expert or --form peft)"
    owner = layout.classes.get(module)
    where = f"{owner or 'its module'}" if owner is not None else f"no such module in {layout.origin}"
    return [], f"no LoRA form for this tensor ({where})"


def tuned_bytes(plan: Plan) -> int:
    """Of all tensors of the tuned checkpoint."""
    return sum(header.bytes for name, header in plan.headers.items() if plan.left_out.get(name) != ONLY_IN_BASE)
