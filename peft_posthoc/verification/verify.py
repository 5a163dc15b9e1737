"""Is base + adapter the tuned model? The weights first, one at a time, then what the models say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

from peft_posthoc.adapters.named_base import another_base
from peft_posthoc.adapters.names import own_name
from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.adapters.open import open_adapter
from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.compute.device import pick_device
from peft_posthoc.errors import AdapterError, PosthocError, one_line
from peft_posthoc.extraction.plan import Plan, everything, make_plan
from peft_posthoc.models.layout import is_of_an_expert
from peft_posthoc.pairing.differences import differences
from peft_posthoc.pairing.experts import Experts
from peft_posthoc.pairing.pair import match
from peft_posthoc.sources import Source, open_pair
from peft_posthoc.text import asked
from peft_posthoc.texts.texts import Texts
from peft_posthoc.verification.findings import Verification
from peft_posthoc.verification.outputs import compare_on_texts, compare_outputs, of_task
from peft_posthoc.verification.weights import Sums, comparable, compare_weights


def verify(
    adapter: str | PathLike[str],
    base: Source,
    tuned: Source,
    *,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    prompts: Sequence[str] = (),
    token_ids: Sequence[Sequence[int]] = (),
    texts: Texts | None = None,
    sequences: int = 64,
    length: int | None = None,
    outputs: bool = True,
    rename: str | Iterable[str] = (),
    serve_as: str | None = None,
    device: str = "cpu",
    progress: bool = False,
    weights_done: Callable[[Verification], object] | None = None,
) -> Verification:
    """Compare base + adapter with the tuned model: weights, then outputs.

    Weights are compared first, and stay compared: where outputs cannot be, the result says why (`failure`).

    Args:
        adapter: A PEFT LoRA folder.
        base: The model before, as in `extract`.
        tuned: The model after.
        base_revision: Branch, tag or commit, where `base` is a hub id.
        tuned_revision: The same for `tuned`.
        prompts: Texts to compare the models' outputs on; needs a tokenizer beside the model.
        token_ids: The same, already tokenized. Without either, a few built-in texts, or random tokens.
        texts: Where text comes from that outputs are compared on in place of these, as in `refine`: `Prompts`, which
            the tuned model answers, `Given`, or what the models write, `Sampled`. Both models are in memory then.
        sequences: How many texts.
        length: How many tokens each has at most; by default as in `refine`.
        outputs: Compare outputs too, not only weights. It loads the models with transformers, one after the other.
        rename: As in `extract`.
        serve_as: As in `extract`.
        device: Where to compute.
        progress: Show progress bars on stderr.
        weights_done: Called with the findings about weights before a model is loaded, for which memory may not suffice.

    Raises:
        AdapterError: The folder is no LoRA adapter, or does not fit the base.
        CheckpointError: A checkpoint cannot be read.
        MismatchError: Base and tuned are not states of one model.
    """
    where = pick_device(device)
    opened = open_pair(base, tuned, base_revision=base_revision, tuned_revision=tuned_revision)
    beside = differences(*opened)
    folder = open_adapter(adapter)
    found = match(
        *opened,
        rules=[rename] if isinstance(rename, str) else list(rename),
        serve_as=serve_as,
        experts=experts_in(folder),
        vocab="extend" if _extends(folder, opened[0]) else "truncate",
        of_tuned=bool(folder.whole),
    )
    before, after = found.base, found.tuned
    plan = make_plan(before, after, choose=everything, layout=found.layout, whole=found.resized)
    stored = AdapterOnModel(folder, before, found.layout)
    _fits(stored, plan)
    names = comparable(before, after, stored, plan)
    sums = compare_weights(before, after, stored, plan, names, where, progress=progress)
    whole = Sums(*map(sum, zip(*sums.values(), strict=True))) if sums else Sums(*[0.0] * 7)
    rows = tuple(own.row(name) for name, own in sums.items())
    carried = [row for row in rows if row.delta_cosine is not None and sums[row.weight].product > 0]
    doubt = another_base(folder.config, opened[0].label)
    note = "not yet" if outputs else "not asked for"
    if serve_as is not None:
        note = f"with {asked('serve_as', None)} only weights are compared"
    result = Verification(
        rows=rows,
        cosine=whole.cosine,
        energy=whole.energy,
        worst=min(carried, key=lambda row: row.delta_cosine or 0.0).weight if carried else "",
        adapter=None,
        base=None,
        outputs_note=note,
        uncompared=tuple(name for name in plan.headers if name not in sums),
        notes=() if doubt is None else (doubt,),
        differences=beside,
    )
    if weights_done is not None:
        weights_done(result)
    if not outputs or serve_as is not None:
        return result
    if texts is not None and (prompts or token_ids):
        raise ValueError(f"Give `{asked('texts', None)}`, or texts one by one.")
    try:
        if texts is not None:
            how: dict[str, Any] = {"sequences": sequences, "length": length, "progress": progress}
            ours, bases = compare_on_texts(before, after, folder, texts, where, **how)
            count = sum(one.tokens for one in ours.values())
            return replace(
                result,
                adapter=of_task(ours),
                base=of_task(bases),
                on_texts={"base": bases, "base + adapter": ours},
                outputs_note=f"on {count} tokens of text like the task's and general",
            )
        adapted, alone, note = compare_outputs(
            before, after, adapter, prompts, token_ids, where, extended=bool(found.resized), progress=progress
        )
    except Exception as error:  # Whatever it is, what is known of the weights is worth keeping.
        known = isinstance(error, PosthocError | ValueError)
        failure = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
        return replace(result, outputs_note="they could not be", failure=failure)
    return replace(result, adapter=adapted, base=alone, outputs_note=note)


def _extends(folder: AdapterFile, base: Checkpoint) -> bool:
    """Tell whether an adapter holds whole embeddings of another vocabulary than the base's."""
    return any(
        own in base.headers
        and base.headers[own].shape[1:] == folder.headers[name].shape[1:]
        and base.headers[own].shape != folder.headers[name].shape
        for name in folder.whole
        if folder.headers[name].shape and (own := own_name(name))
    )


def _fits(stored: AdapterOnModel, plan: Plan) -> None:
    """See that tensors held whole have the shapes of the model.

    Raises:
        AdapterError: One of them has another.
    """
    shapes = {own: header.shape for name, header in plan.headers.items() for own in plan.layout.names_of(name)}
    for name, key in stored.replaced.items():
        shape = stored.folder.headers[key].shape
        if shapes.get(name) != shape:
            there = f"in the base it is {list(shapes[name])}" if name in shapes else "the base does not have it"
            raise AdapterError(f"`{stored.folder.label}` holds `{name}` whole, as {list(shape)}; {there}.")


def experts_in(folder: AdapterFile) -> Experts:
    """How an adapter holds experts."""
    if any(module.kind == "experts" for module in folder.modules.values()):
        return "fused"
    return "per-expert" if any(map(is_of_an_expert, folder.modules)) else "none"
