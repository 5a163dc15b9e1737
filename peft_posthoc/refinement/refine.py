"""Refine an adapter: its factors, fitted within its own file layout to what the tuned model computes."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from peft_posthoc.adapters.card import KINDS as IN_WORDS
from peft_posthoc.adapters.card import REPORT
from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.adapters.writer import copied
from peft_posthoc.compute.device import in_bfloat16, pick_device
from peft_posthoc.compute.together import Together
from peft_posthoc.errors import PosthocError
from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.processes import ALONE, Processes
from peft_posthoc.json_file import read_json
from peft_posthoc.refinement.clock import Clock
from peft_posthoc.refinement.compensated import compensated
from peft_posthoc.refinement.method import Fit, Method, check_positive
from peft_posthoc.refinement.movable import factors_of, movable, rounded
from peft_posthoc.refinement.opened import Refinable, opened
from peft_posthoc.refinement.refined import Refined
from peft_posthoc.refinement.sharded import check_processes
from peft_posthoc.refinement.state import State, going_on, is_same, state_of
from peft_posthoc.refinement.steps import put
from peft_posthoc.refinement.usual import Usual
from peft_posthoc.running.inputs import identity_of
from peft_posthoc.running.live import Live
from peft_posthoc.sources import Source
from peft_posthoc.text import asked
from peft_posthoc.texts.distance import Score
from peft_posthoc.texts.sequences import KINDS, Split, Tokens, split
from peft_posthoc.texts.texts import Sampled, Texts, usual_length
from peft_posthoc.texts.writers import Writers

_WRITING = 0.5
"""Of the time that is left after loading, what may go into text."""
_FEW = 3
"""Held-out texts of a kind that are too few to tell distances well."""
_GUESSED = Sampled()
"""Text that nobody said anything of: the task may be another."""


def refine(
    adapter: Refinable,
    base: Source | None = None,
    tuned: Source | None = None,
    *,
    texts: Texts | None = None,
    method: Method | Usual | None = None,
    sequences: int = 960,
    length: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    device: str = "cpu",
    tokenizer: Any = None,
    adapter_name: str = "default",
    out: str | os.PathLike[str] | None = None,
    since: float | None = None,
    processes: Processes = ALONE,
    progress: bool = False,
) -> Refined:
    """Fit an adapter's factors to the tuned model's outputs, without labels, and by default without data.

    Modules, ranks, scale and file layout stay what they were. What is fitted is judged on held-out text, both like the
    task's and general: on neither is the adapter ever further from the tuned model than it was.

    Args:
        adapter: A PEFT LoRA folder of `base`, or what `extract` gave; or PEFT's model with the adapter on it, which is
            refined in place: its factors get other values in their own types, and nothing else of it changes.
        base: The model before, as in `extract`: a folder or a hub id of a causal language model, or a live one. None
            for an adapter that is on its model.
        tuned: The model after.
        texts: Where text comes from; by default the two models write it themselves (`Sampled`).
        method: How the factors are fitted: `distil`, `compensated` or `blocks`; the last two have a block of each
            model in memory at a time, unless models are alive. By default `distil`; where both models do not fit into
            memory at once, `blocks`, or `distil` that splits them among several GPUs.
        sequences: How many texts.
        length: How many tokens each has at most; by default 128 (without data a chat template's come on top), and with
            longer prompts 64 more than the longest has, but no more than 1024.
        minutes: How long all of it may take, from loading to the last judging. Text takes half of what is left after
            loading at most, and stops in time; the fit has the rest.
        seed: Of all that is drawn.
        base_revision: Branch, tag or commit, where `base` is a hub id.
        tuned_revision: The same for `tuned`.
        device: Where models are loaded to; live ones stay where they are.
        tokenizer: What text is encoded with; by default what lies beside `tuned` or `base`.
        adapter_name: Of the adapter on a live model.
        out: Where the adapter will be saved. What an interrupted run goes on from is kept beside it until it is.
        since: When the minutes began, as `time.monotonic()` told; now if None.
        processes: Those that share the work, as `Processes.from_environment()` finds them: each holds both models, or a
            part of them (`distil(shard=True)`).
        progress: Show progress bars on stderr.

    Returns:
        The refined adapter with its account.

    Raises:
        AdapterError: The folder is no plain LoRA adapter, or PEFT does not load it.
        CheckpointError: A model cannot be loaded, or is no causal language model.
        MismatchError: The two models are not of one class.
        ShareDone: Something went wrong, and the first of several processes tells of it.
        PosthocError: There is no text to fit on, or the models' outputs are no numbers.
        ValueError: An argument makes no sense.
    """
    check_numbers(sequences, length, minutes, seed)
    if tuned is None:
        raise ValueError("`refine(tuned=...)` is the model to come near to; it has no default.")
    if isinstance(method, str):
        raise ValueError(f"`refine(method=...)` is `distil()`, `compensated()` or `blocks()`. Got `{method}`.")
    if texts is not None and not hasattr(texts, "write"):
        raise ValueError(
            f"`refine(texts=...)` is `Prompts([...])`, `Given([...])` or `Sampled()`. Got `{texts!r:.40}`."
        )
    clock, given, chosen = Clock(minutes, since), texts or Sampled(), method or Usual()
    where = pick_device(device)
    together = Together(processes.rank, processes.size, where)
    if isinstance(chosen, Usual):
        with together.agreed():
            usual = chosen.method(
                base,
                tuned,
                base_revision=base_revision,
                tuned_revision=tuned_revision,
                device=where,
                processes=processes.size,
            )
        chosen = together.first(usual)
    asked_for = {
        "texts": {"kind": type(given).__name__.lower(), "sequences": sequences, "length": length},
        "method": {"kind": type(chosen).__name__, **vars(chosen)},
        "minutes": minutes,
        "seed": seed,
    }
    shard = getattr(chosen, "shard", False)
    if shard:
        check_processes(processes.size)
    with ExitStack() as stack:
        with together.agreed():
            found = stack.enter_context(
                opened(
                    adapter,
                    base,
                    tuned,
                    base_revision=base_revision,
                    tuned_revision=tuned_revision,
                    device=device,
                    tokenizer=tokenizer,
                    adapter_name=adapter_name,
                    streams=chosen.streams,
                    shard=shard,
                )
            )
            factors = factors_of(found.live.adapted, found.live.name, found.file)
            stored = {name: found.file.tensor(name) for name in found.file.headers}
        together.split = shard
        work = _Work(replace(found.live, together=together), given, chosen, clock, seed, progress)
        state = None
        if out is not None and not together.rank:
            encodes = identity_of(found.live.tokenizer)
            state = state_of(out, [found.models, encodes, stored, dict(found.file.config), given, chosen, asked_for])
        with together.alike(), going_on(state):
            parts = work.texts(sequences, length, state)
            alone, judging = work.alone(parts)
            with movable(work.live.adapted, factors):
                # No two clocks say the same: that of the first process decides.
                seconds = together.first(clock.seconds and clock.seconds - judging)
                fit = chosen(work.live, factors, parts, seed=seed, seconds=seconds, progress=progress, state=state)
                tensors, after, kept = stored, fit.before, fit.kept
                if not kept:
                    # What is judged is what is written: rounded to the types of the file.
                    put(factors, saved := rounded(found.file, factors, stored))
                    judged = work.live.distances(parts.held_out, size=chosen.size)
                    kept = any(not judged[kind].kl <= fit.before[kind].kl for kind in fit.before)
                    if not kept:
                        tensors, after = stored | saved, judged
                put(factors, tensors)
        start = _report(found.file)
        in_place = not kept and out is not None and is_same(found.called, out)
        beside = adapter.beside if isinstance(adapter, Adapter) else copied(found.file.place)
    return Refined(
        adapter=found.called,
        base=alone,
        before=fit.before,
        after=after,
        kept=kept,
        interrupted=fit.interrupted,
        steps=fit.steps,
        lr=fit.lr,
        unmoved=fit.unmoved,
        texts=Counter(text.kind for text in parts.fitted),
        seconds=fit.seconds,
        options=asked_for,
        tensors=tensors,
        config=found.file.config,
        start=start,
        beside=beside,
        provenance={
            "refined": found.called,
            "base": found.file.config.get("base_model_name_or_path"),
            "tuned": found.tuned,
            "options": asked_for,
            "versions": {name: metadata.version(name) for name in ("peft-posthoc", "peft", "torch", "transformers")},
        },
        notes=tuple(_notes(work, parts, fit, alone=alone, config=found.file.config)),
        left=tuple(_left(state, fit, in_place=in_place)),
    )


def check_numbers(sequences: int, length: int | None, minutes: float | None, seed: int) -> None:
    """See that a fit can be had of them.

    Raises:
        ValueError: One is too small, or the seed is none.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"`seed` must be an integer of 64 bits. Got {seed}.")
    for name, value, least in (("sequences", sequences, 4), ("length", length, 2)):
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}. Got {value}.")
    check_positive(minutes=minutes)


@dataclass(frozen=True)
class _Work:
    """What the steps of a refinement share."""

    live: Live
    given: Texts
    method: Method
    clock: Clock
    seed: int
    progress: bool

    def texts(self, sequences: int, length: int | None, state: State | None) -> Split:
        """The texts, held out or not.

        Raises:
            PosthocError: They are too few.
        """
        live = self.live
        with live.adapted.disable_adapter():
            with live.together.agreed():
                live.check_finite()
            written = live.together.first(None if state is None else state.texts())
            if written is None:
                written = self._written(sequences, length)
                if state is not None:
                    state.keep_texts(written)
        parts = split([text for text in written if len(text.ids) > 1])
        if not parts.fitted or {text.kind for text in parts.held_out} != {*KINDS}:
            late = self.clock.seconds is not None and len(written) < sequences
            more = f"Give more time: `{asked('minutes', None)}`." if late else "Give more."
            raise PosthocError(
                f"Of {len(written)} texts too few differ, and have two tokens or more, to fit on some and judge by "
                f"others of each kind. {more}"
            )
        return parts._replace(guessed=self.given == _GUESSED)

    def _written(self, sequences: int, length: int | None) -> list[Tokens]:
        live = self.live
        with live.writers() as pair:
            until = self.clock.until(_WRITING)
            writers = Writers(*pair, live.tokenizer, live.vocabulary, until=until, together=live.together)
            length = length or usual_length(self.given, writers)
            length = min(length, live.longest or length)
            # Models that are loaded to write are in the type of their files.
            with in_bfloat16(live.device, getattr(self.method, "bf16", False) and not self.method.streams):
                written = self.given.write(
                    writers, count=sequences, length=length, seed=self.seed, progress=self.progress
                )
        return live.together.first(written)

    def alone(self, parts: Split) -> tuple[Score, float]:
        """How far the base is, and how long it takes to see that."""
        start = time.monotonic()
        with self.live.adapted.disable_adapter():
            found = self.live.distances(parts.held_out, size=self.method.size)
        return found, time.monotonic() - start


def _notes(work: _Work, parts: Split, fit: Fit, *, alone: Score, config: Mapping[str, Any]) -> Iterator[str]:
    if work.given == _GUESSED:
        prompts = asked("prompts", None) if _on_command_line() else "texts=Prompts([...])"
        yield (
            "Fitted to text that the models wrote, and judged by it. Your task may be another, and come out worse. "
            f"A few dozen prompts of it are better: `{prompts}`."
        )
        if isinstance(work.method, compensated):
            yield (
                "`compensated` gives each layer what this text needs, and lets go of the rest. Without prompts "
                "`blocks`, which takes as little memory, loses less of what looks otherwise."
            )
    if not parts.prompts_held_out:
        yield "With fewer than ten prompts none is held out: it was judged by other answers to the same ones."
    if config.get("bias", "none") != "none":
        yield "Its biases stay on the base where the adapter is switched off: what is told of the base is with them."
    if all(fit.before[kind].kl > alone[kind].kl for kind in alone):
        yield (
            "The adapter took the base further from the tuned model than it is by itself. Is it of these two models, "
            "in this order?"
        )
    judges = Counter(text.kind for text in parts.held_out)
    if min(judges.values()) < _FEW:
        few = " and ".join(f"{judges[kind]} {said}" for kind, said in IN_WORDS.items())
        yield f"Few texts judge ({few}): the distances are rough. Use more: `{asked('sequences', None)}`."
    if work.clock.seconds is not None and not fit.steps:
        yield f"The time was over before the fit began. Give more (`{asked('minutes', None)}`)."


def _left(state: State | None, fit: Fit, *, in_place: bool) -> Iterator[str]:
    if state is not None and fit.interrupted and in_place:
        yield "It takes the place of what the fit began with: the same again starts from here, and does not go on."
    elif state is not None and fit.interrupted:
        again = f"The same command with `{asked('force')}`" if _on_command_line() else "The same call"
        yield f"What it goes on from is kept in `{state.folder}`. {again} goes on from there."
    if state is not None and state.others:
        yield "What an interrupted run with other options or models had kept for this place was not used."


def _on_command_line() -> bool:
    return asked("force").startswith("-")


def _report(source: AdapterFile) -> Any:
    """The account of the adapter before, if it has one: what it says of weights holds of that."""
    try:
        return read_json(source.place / REPORT)
    except (OSError, ValueError):
        return None
