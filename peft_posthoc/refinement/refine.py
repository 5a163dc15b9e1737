"""Refine an adapter: its factors, fitted within its own file layout to what the tuned model computes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import cast, widest
from peft_posthoc.adapters.module import Module
from peft_posthoc.adapters.open import open_adapter
from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.adapters.writer import REPORT
from peft_posthoc.compute.device import pick_device
from peft_posthoc.errors import AdapterError, PosthocError
from peft_posthoc.json_file import read_json
from peft_posthoc.refinement.distil import distil
from peft_posthoc.refinement.live import Live, factors_of, load_live, says
from peft_posthoc.refinement.method import Method
from peft_posthoc.refinement.refined import Refined
from peft_posthoc.refinement.sequences import KINDS, Batch, Split, split
from peft_posthoc.refinement.steps import put
from peft_posthoc.refinement.texts import Sampled, Texts, Writers
from peft_posthoc.sources import Source, open_pair


def refine(
    adapter: str | os.PathLike[str],
    base: Source,
    tuned: Source,
    *,
    texts: Texts | None = None,
    method: Method | None = None,
    sequences: int = 960,
    length: int = 128,
    minutes: float | None = None,
    seed: int = 0,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> Refined:
    """Fit an adapter's factors to the tuned model's outputs, without labels, and by default without data.

    Modules, ranks, scale and file layout stay what they were. What is fitted is judged on held-out text, both like the
    task's and general: on neither is the adapter ever further from the tuned model than it was.

    Args:
        adapter: A PEFT LoRA folder of `base`.
        base: The model before, as in `extract`: a folder or a hub id, of a causal language model.
        tuned: The model after.
        texts: Where text comes from; by default the two models write it themselves (`Sampled`).
        method: How the factors are fitted: `distil` or `compensated`.
        sequences: How many texts.
        length: How many tokens each has at most.
        minutes: When to stop fitting at the latest.
        seed: Of all that is drawn.
        base_revision: Branch, tag or commit, where `base` is a hub id.
        tuned_revision: The same for `tuned`.
        device: Where to compute.
        progress: Show progress bars on stderr.

    Returns:
        The refined adapter with its account.

    Raises:
        AdapterError: The folder is no plain LoRA adapter, or PEFT does not load it.
        CheckpointError: A model cannot be loaded, or is no causal language model.
        MismatchError: The two models are not of one class.
        PosthocError: There is no text to fit on, or the models' outputs are no numbers.
        ValueError: An argument makes no sense.
    """
    for name, value, least in (("sequences", sequences, 4), ("length", length, 2)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}. Got {value}.")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"`minutes` must be more than 0. Got {minutes}.")
    where, source = pick_device(device), open_adapter(adapter)
    opened = open_pair(base, tuned, base_revision=base_revision, tuned_revision=tuned_revision)
    with torch.random.fork_rng():  # PEFT draws what it then replaces.
        live = load_live(*opened, adapter, where)
    factors = factors_of(live.adapted)
    _check_names(source, factors)
    chosen, given = method or distil(), texts or Sampled()
    parts = _texts(live, given, sequences, length, seed, progress)
    with live.adapted.disable_adapter():
        alone = live.distances(parts.held_out, size=chosen.size)
    fit = chosen(live, factors, parts, seed=seed, seconds=minutes and 60 * minutes, progress=progress)
    stored = {name: source.tensor(name) for name in source.headers}
    tensors, after, kept = stored, fit.before, fit.kept
    if not kept:
        # What is judged is what is written: rounded to the types of the file.
        rounded = {name: x for module in source.modules.values() for name, x in _saved(module, factors, stored).items()}
        put(factors, rounded)
        found = live.distances(parts.held_out, size=chosen.size)
        kept = any(not found[kind].kl <= fit.before[kind].kl for kind in fit.before)
        if not kept:
            tensors, after = stored | rounded, found
    options = {
        "texts": {"kind": type(given).__name__.lower(), "sequences": sequences, "length": length},
        "method": {"kind": type(chosen).__name__, **vars(chosen)},
        "minutes": minutes,
        "seed": seed,
    }
    return Refined(
        adapter=source.label,
        base=alone,
        before=fit.before,
        after=after,
        kept=kept,
        interrupted=fit.interrupted,
        steps=fit.steps,
        unmoved=fit.unmoved,
        texts=Counter(text.kind for text in parts.fitted),
        seconds=fit.seconds,
        options=options,
        tensors=tensors,
        config=source.config,
        start=_report(source),
        provenance={
            "refined": source.label,
            "base": source.config.get("base_model_name_or_path"),
            "tuned": opened[1].label,
            "options": options,
            "versions": {name: metadata.version(name) for name in ("peft-posthoc", "peft", "torch", "transformers")},
        },
    )


def _texts(live: Live, given: Texts, sequences: int, length: int, seed: int, progress: bool) -> Split:
    """The texts, held out or not.

    Raises:
        PosthocError: They are too few.
    """
    with live.adapted.disable_adapter():
        _check_finite(live)
        writers = Writers(live.adapted, live.tuned, live.tokenizer, live.vocabulary)
        written = given.write(writers, count=sequences, length=length, seed=seed, progress=progress)
    parts = split([text for text in written if len(text.ids) > 1])
    if not parts.fitted or {text.kind for text in parts.held_out} != {*KINDS}:
        raise PosthocError(
            f"Of {len(written)} texts too few differ, and have two tokens or more, to fit on some and judge by others "
            "of each kind. Give more."
        )
    return parts


@torch.no_grad()
def _check_finite(live: Live) -> None:
    """See that there is something to draw from.

    Raises:
        PosthocError: A model's outputs are no numbers.
    """
    for name, model in (("tuned model", live.tuned), ("base", live.adapted)):
        ids = torch.arange(min(live.vocabulary, 8), device=model.device)[None]
        if not torch.isfinite(says(model)(Batch(ids, torch.ones_like(ids)))).all():
            raise PosthocError(f"The {name} says what is no number: there is nothing to fit to.")


def _check_names(source: AdapterFile, factors: Mapping[str, Tensor]) -> None:
    """See that the model holds every factor of the file as it is.

    Raises:
        AdapterError: PEFT holds one under another name, or in another shape.
    """
    for name in (name for module in source.modules.values() for name in module.tensor_names()):
        if name not in factors or factors[name].shape != source.headers[name].shape:
            raise AdapterError(f"PEFT does not hold `{name}` of `{source.label}` as the file does; it is not refined.")


def _saved(module: Module, factors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's factors as they are now, in the types of the file."""
    a, b = module.tensor_names()
    wide = widest((stored[a].dtype, stored[b].dtype))
    parts = module.split(factors[a].detach().cpu(), factors[b].detach().cpu())
    joined = module.join([cast(part.a, part.b, wide, module.name) for part in parts])
    return {name: tensor.to(stored[name].dtype).reshape(stored[name].shape) for name, tensor in joined.items()}


def _report(source: AdapterFile) -> Any:
    """The account of the adapter before, if it has one: what it says of weights holds of that."""
    try:
        return read_json(source.place / REPORT)
    except (OSError, ValueError):
        return None
