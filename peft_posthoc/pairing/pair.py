"""Two checkpoints of one model brought under the same names and into the same pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.model_files import config_of
from peft_posthoc.errors import MismatchError
from peft_posthoc.models.as_model import as_model
from peft_posthoc.models.config import architecture
from peft_posthoc.models.find import layout_of
from peft_posthoc.models.layout import Layout
from peft_posthoc.models.serve_as import layout_to_serve
from peft_posthoc.models.ties import once, without_false_ties
from peft_posthoc.pairing.experts import Experts, see_experts
from peft_posthoc.pairing.names import Renamed, as_named, by_rules
from peft_posthoc.pairing.vocabulary import Vocab, see_vocabulary
from peft_posthoc.text import asked


class Match(NamedTuple):
    """Base and tuned as they are compared."""

    base: Checkpoint
    tuned: Checkpoint
    layout: Layout
    resized: frozenset[str]
    """The tensors that no factors lead to, since they have other rows than the base's."""
    notes: tuple[str, ...]
    """Decisions on the way, for people."""


def match(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    rules: Sequence[str] = (),
    serve_as: str | None = None,
    experts: Experts = "none",
    vocab: Vocab = "error",
    of_tuned: bool = False,
) -> Match:
    """See two checkpoints as two states of one model, tensor by tensor.

    Args:
        base: The checkpoint before.
        tuned: The checkpoint after.
        rules: `regex=>replacement`, over the tensor names of both.
        serve_as: The class that the adapter is for, or the folder of a model of that class, if it is not the base's.
        experts: As what the matrices of a mixture of experts are seen (`experts.see_experts`).
        vocab: What to do about vocabularies of different sizes (`vocabulary.see_vocabulary`).
        of_tuned: Whether the adapter is for the tuned model's class, where that is another: it may have a new head.

    Raises:
        MismatchError: Their names or experts cannot be brought together.
        ValueError: A rule is malformed, or changes no name; there is no such class.
    """
    base, tuned = _as_components(base, tuned, serve_as)
    base, told_base, used_base = by_rules(base, rules)
    tuned, told_tuned, used_tuned = by_rules(tuned, rules)
    notes = [*told_base, *told_tuned]
    if idle := [rule for rule in rules if rule not in used_base | used_tuned]:
        names, option = list(tuned.headers), asked("rename", idle[0])
        raise ValueError(f"`{option}` changes no tensor name. Names look like `{names[len(names) // 2]}`.")
    if serve_as is None:
        layout = layout_of(base, tuned, of_tuned=of_tuned)
    else:
        layout, wanted = layout_to_serve(serve_as, base, tuned)
        base, told, _ = as_named(base, wanted, layout)
        notes += told
        layout, _ = layout_to_serve(serve_as, base, tuned)  # Experts are found by the new names.
    stored = base.headers
    base, tuned = as_model(base, layout), as_model(tuned, layout)
    tuned, told, _ = _as_base(tuned, {**stored, **base.headers}, layout)
    if told and serve_as is None:
        # By the new names it knows experts, and what is stored in other pieces.
        layout = layout_of(base, tuned, of_tuned=of_tuned)
        tuned = as_model(tuned, layout)
    layout = without_false_ties(layout, base, tuned)
    (base, again), (tuned, tuned_again) = once(base, layout), once(tuned, layout)
    base, tuned, layout = see_experts(base, tuned, layout, experts)
    base, tuned, resized, said = see_vocabulary(base, tuned, layout, vocab)
    return Match(base, tuned, layout, resized, (*notes, *told, *again, *tuned_again, *said))


def _as_components(base: Checkpoint, tuned: Checkpoint, serve_as: str | None) -> tuple[Checkpoint, Checkpoint]:
    """Both under the names of a class of diffusers, where one is its, or it is asked for: files have others."""
    folder = Path(serve_as) if serve_as is not None else None
    wanted = [config_of(folder)] if folder is not None and folder.is_dir() else [base.config, tuned.config]
    config = next((one for one in wanted if one and ("_class_name" in one or _is_clip(one))), None)
    if config is None or (folder is None and base.headers.keys() == tuned.headers.keys()):
        return base, tuned
    from peft_posthoc.models.original import as_component

    return as_component(base, config), as_component(tuned, config)


def _is_clip(config: Mapping[str, object]) -> bool:
    """Whether a model is a text encoder that files under original names may have."""
    return (architecture(config) or "").startswith("CLIPText")


def served_as(
    served: Checkpoint,
    base: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rules: Sequence[str] = (),
    serve_as: str | None = None,
    experts: Experts = "none",
) -> Checkpoint:
    """See another form of the base, such as a quantised one, under the names of the weights that are carried.

    Args:
        served: It.
        base: The base.
        shapes: By name, the weights.
        rules: As in `match`.
        serve_as: As in `match`.
        experts: As in `match`.

    Raises:
        MismatchError: It lacks one of the weights, or has it in another shape.
    """
    used = by_rules(base, rules)[2] | by_rules(served, rules)[2]
    own = [rule for rule in rules if rule in used]
    seen = match(base, served, rules=own, serve_as=serve_as, experts=experts).tuned
    for name, shape in shapes.items():
        if name not in seen.headers or (found := seen.headers[name].shape) != shape:
            what = f"is {list(found)} in `{served.label}`" if name in seen.headers else f"is not in `{served.label}`"
            raise MismatchError(
                f"`{name}` {what}, and {list(shape)} in the base `{base.label}`: "
                f"`{asked('for_base', served.label)}` is no form of it. Give the base's own quantised form, or leave "
                f"the weight out with `{asked('exclude', None)}`."
            )
    return seen


def _as_base(tuned: Checkpoint, headers: Mapping[str, Header], layout: Layout) -> Renamed:
    """The tuned checkpoint under the names of the base's files; by way of the live model's, if more are found so."""
    wanted = {name: header.shape for name, header in headers.items()}
    found = as_named(tuned, wanted, layout)
    if not (layout.renamed or layout.conversions) or found.checkpoint.headers.keys() <= wanted.keys():
        return found
    try:
        live = as_named(tuned, {layout.name_of(name): shape for name, shape in wanted.items()}, layout)
        back = as_named(live.checkpoint, wanted, layout)
    except MismatchError:
        return found
    more = len(back.checkpoint.headers.keys() & wanted.keys()) > len(found.checkpoint.headers.keys() & wanted.keys())
    return Renamed(back.checkpoint, (*live.notes, *back.notes)) if more else found
