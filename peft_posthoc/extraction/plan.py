"""What will be carried and what not, and why: decided from headers alone, before a tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.modules import module_of
from peft_posthoc.checkpoints.quantized.undecoded import quantized
from peft_posthoc.errors import CheckpointError, MismatchError, NothingToCarryError
from peft_posthoc.extraction.fate import Factored, Fate, Whole
from peft_posthoc.extraction.reasons import LeftOut, Reason, told
from peft_posthoc.linalg.spectrum import RankRule
from peft_posthoc.models.config import architecture
from peft_posthoc.models.find import layout_of
from peft_posthoc.models.layout import Layout, Place, Role
from peft_posthoc.models.order import in_order
from peft_posthoc.models.part import Part
from peft_posthoc.models.slots import Slot, slots_of
from peft_posthoc.pairing.vocabulary import resized, way_out
from peft_posthoc.patterns import asked_for
from peft_posthoc.text import asked, counted

Choice = Callable[[Sequence[Place]], "tuple[Place, ...] | LeftOut"]
"""Of the places a weight lives in, those to adapt; or why none is."""


@dataclass(frozen=True)
class Plan:
    """The fate of every tensor of both checkpoints, and what is known of their model."""

    fates: Mapping[str, Fate]
    """By weight."""
    layout: Layout
    slots: Mapping[str, Slot]
    """Every module of the base that could hold factors."""
    headers: Mapping[str, Header]
    """Of every tensor, the tuned one's where both have it."""
    called: Mapping[str, str] = field(default_factory=dict)
    """By module, the name that its factors must have in a file for PEFT to load them, where it is another."""

    @cached_property
    def factored(self) -> dict[str, Factored]:
        """By weight, what is carried as factors."""
        return {name: fate for name, fate in self.fates.items() if isinstance(fate, Factored)}

    @cached_property
    def carried(self) -> dict[str, tuple[Place, ...]]:
        """By weight with factors, the modules that get them."""
        return {name: fate.places for name, fate in self.factored.items()}

    @cached_property
    def kept(self) -> dict[str, Whole]:
        """By weight, what has no factors but is in the file all the same."""
        return {name: fate for name, fate in self.fates.items() if isinstance(fate, Whole)}

    @cached_property
    def left_out(self) -> dict[str, LeftOut]:
        """By weight, what is not in the file."""
        return {name: fate for name, fate in self.fates.items() if isinstance(fate, LeftOut)}

    def slot(self, name: str) -> Slot:
        """The matrix that a carried weight is."""
        return self.slots[self.carried[name][0].module]

    def ruled(self, rules: Mapping[str, RankRule]) -> Plan:
        """The same plan with a rank rule for each weight; those that have none are not carried.

        Raises:
            NothingToCarryError: None has one.
        """
        without = LeftOut(Reason.NO_RANK)
        if self.factored.keys().isdisjoint(rules):
            raise NothingToCarryError(f"No weight is left to carry: {without.hint}.")
        ruled = {
            name: Factored(fate.places, rules[name]) if name in rules else without
            for name, fate in self.factored.items()
        }
        return replace(self, fates={**self.fates, **ruled})


# The option that carries weights in such places.
_OPTIONS: Mapping[Role, str] = {
    "convolution": "conv",
    "embedding": "embeddings",
    "expert": "experts",
    "head": "head",
}


def by_flags(*, embeddings: bool = False, head: bool = False, conv: bool = False, experts: bool = False) -> Choice:
    """Carry all layers, and token embeddings, the head, convolutions and experts where asked for.

    Where the two are tied they are one weight, and either flag carries it in both places: half of it is no model.
    """
    asked = {"embedding": embeddings, "head": head, "convolution": conv, "expert": experts}
    wanted = {"layer", *(role for role, flag in asked.items() if flag)}

    def choose(places: Sequence[Place]) -> tuple[Place, ...] | LeftOut:
        roles = {place.role for place in places}
        if places and places[0].kind.stacked and places[0].part is None:
            return LeftOut(Reason.BIAS_OF_EXPERTS)
        if roles & wanted:
            return tuple(places)
        # Experts are carried in more than one way.
        ways = {_OPTIONS[role]: None if role == "expert" else True for role in sorted(roles)}
        return LeftOut(Reason.NOT_ASKED_FOR, (" and ".join(sorted(roles)),), ways)

    return choose


def everything(places: Sequence[Place]) -> tuple[Place, ...]:
    """Carry all that can be carried, embeddings and head too."""
    return tuple(places)


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
        CheckpointError: No weight is left to carry, and some are quantised.
        NothingToCarryError: No weight is left to carry.
        ValueError: A regular expression is malformed or matches nothing.
    """
    packed = [quantized(side) for side in (base, tuned)]
    stored = {_stored(name) for side in (base, tuned) for name in side.headers}
    _same_model(base, tuned)
    names = list(dict.fromkeys([*base.headers, *tuned.headers]))
    included = _matches(include, names, "include")
    excluded = _matches(exclude, names, "exclude")
    unwanted = leave_out or {}
    choose = choose or by_flags()
    layout = (layout or layout_of(base, tuned)).without_ties(set(tuned.headers) - set(base.headers))
    _same_shapes(base, tuned, layout, {*(excluded or ()), *unwanted, *packed[0], *packed[1]})

    slots = slots_of(_headers_of_weights(base, tuned, packed), layout)

    def fate_of(name: str) -> Fate:
        if name in unwanted:
            return told(unwanted[name])
        for side in packed:
            if one := side.get(name) or side.get(_stored(name)):
                # A weight is told once: by its own name, where one of the two has it.
                is_part = one.is_part or (one.weight != _stored(name) and one.weight in stored)
                return LeftOut(Reason.OF_QUANTIZED if is_part else Reason.QUANTIZED, (one.format,))
        if (folder := module_of(name)) and name in base.headers and name in tuned.headers:
            return LeftOut(Reason.BESIDE_MODEL, (folder,))
        fate = _fate(name, base.headers, tuned.headers, layout, choose)
        if name in whole:
            return LeftOut(Reason.OTHER_ROWS)
        outside = (included is not None and name not in included) or (excluded and name in excluded)
        return LeftOut(Reason.NOT_CHOSEN) if isinstance(fate, Factored) and outside else fate

    plain = [name for name in packed[1] if name in base.headers and name not in packed[0]]
    headers = {**base.headers, **tuned.headers, **{name: base.headers[name] for name in plain}}
    ordered = in_order(headers, layout)
    plan = Plan({name: fate_of(name) for name in ordered}, layout, slots, {name: headers[name] for name in ordered})
    if not plan.factored:
        for side, found, role in ((base, packed[0], "base"), (tuned, packed[1], "tuned")):
            if first := next((name for name in side.headers if name in found), None):
                raise CheckpointError(
                    f"The {role} `{side.label}` is quantised (`{first}` is {side.headers[first].dtype}: "
                    f"{found[first].format}); its numbers need their scales. Give the checkpoint it was made from, or "
                    "dequantize it first; if it was cast and never scaled, give the single file, or save it in 16 bits."
                )
        reasons = ", ".join(sorted({fate.hint for fate in plan.left_out.values()}))
        raise NothingToCarryError(f"No weight of `{base.label}` and `{tuned.label}` can be carried: {reasons}.")
    return plan


def _stored(name: str) -> str:
    """The name of the tensor that one is a part of, or its own."""
    part = Part.named(name)
    return part.tensor if part else name


def _headers_of_weights(base: Checkpoint, tuned: Checkpoint, packed: Sequence[Collection[str]]) -> dict[str, Header]:
    """The headers of the base's tensors; of those that it holds as codes, the tuned one's, which have the shapes."""
    shown = [
        {name: header for name, header in side.headers.items() if name not in coded}
        for side, coded in zip((base, tuned), packed, strict=True)
    ]
    return {name: found for name in base.headers if (found := shown[0].get(name) or shown[1].get(name))}


def _same_model(base: Checkpoint, tuned: Checkpoint) -> None:
    configs = [checkpoint.config or {} for checkpoint in (base, tuned)]
    kinds = [config.get("model_type") for config in configs]
    # A model with images may be compared with its language model.
    parts = [{config.get("model_type"), (config.get("text_config") or {}).get("model_type")} for config in configs]
    # One class may have several types of configurations.
    classes = {architecture(config) for config in configs}
    if all(kinds) and not (parts[0] & parts[1]) - {None} and (len(classes) > 1 or "" in classes):
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
        number = counted(len(wrong), "tensor has another shape", "tensors have other shapes")
        raise MismatchError(
            f"{number} in tuned than in base: {'; '.join(wrong)}. Give the base that the "
            f"fine-tune started from, or leave these out with `{asked('exclude', None)}`."
        )


def _matches(patterns: Iterable[str], names: Sequence[str], option: str) -> set[str] | None:
    """The names that any pattern is found in; None without patterns."""
    found: set[str] | None = None
    for pattern in patterns:
        hits = asked_for(pattern, names, option)
        if not hits:
            raise ValueError(
                f"`{asked(option, pattern)}` matches no weight name. Names look like `{names[len(names) // 2]}`."
            )
        found = (found or set()) | hits
    return found


def _fate(
    name: str, base: Mapping[str, Header], tuned: Mapping[str, Header], layout: Layout, choose: Choice
) -> Factored | LeftOut:
    if name not in base and layout.name_of(name) in layout.unread:
        return LeftOut(Reason.UNREAD)
    if reason := _no_matrix(name, base, tuned):
        return LeftOut(reason)
    places = layout.places(name)
    if places and places[0].kind.size(base[name].shape) is not None:
        chosen = choose(places)
        return chosen if isinstance(chosen, LeftOut) else Factored(chosen)
    if layout.of_experts(name):
        return LeftOut(Reason.EXPERT)
    module = layout.module_of(name)
    if module in layout.mistaken:
        return LeftOut(Reason.BESIDE_EXPERTS)
    owner = layout.classes.get(module)
    where = f"{owner or 'its module'}" if owner is not None else f"no such module in {layout.origin}"
    return LeftOut(Reason.NO_FORM, (where,))


def _no_matrix(name: str, base: Mapping[str, Header], tuned: Mapping[str, Header]) -> Reason | None:
    """Why a tensor is no difference of two matrices; None if it is one."""
    if name not in tuned:
        return Reason.ONLY_IN_BASE
    if name not in base:
        return Reason.ONLY_IN_TUNED
    header = base[name]
    if header.shape != tuned[name].shape:
        return Reason.OTHER_SHAPE
    if not (header.dtype.is_floating_point and tuned[name].dtype.is_floating_point):
        return Reason.NOT_FLOATING
    if name.endswith(".bias") or name == "bias":
        return Reason.BIAS
    if 0 in header.shape:
        return Reason.EMPTY
    return Reason.VECTOR if len(header.shape) < 2 else None


def tuned_bytes(plan: Plan) -> int:
    """Of all tensors of the tuned checkpoint."""
    only_in_base = {name for name, fate in plan.left_out.items() if fate.reason is Reason.ONLY_IN_BASE}
    return sum(header.bytes for name, header in plan.headers.items() if name not in only_in_base)
