"""Distillation, a block at a time: the factors of each, moved until it gives what the tuned block gives."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from peft_posthoc.compute.device import in_bfloat16
from peft_posthoc.progress import progress_bar
from peft_posthoc.refinement.chain import chains_of
from peft_posthoc.refinement.method import LATE, UNREAD, Fit, check_positive, finite, kept_or_put_back
from peft_posthoc.refinement.state import State
from peft_posthoc.refinement.steps import Steps, check_steps, copies, modules_of, movable_by_steps, put, still
from peft_posthoc.refinement.walk import Stretch, Walk
from peft_posthoc.running.live import Live
from peft_posthoc.texts.distance import divergence
from peft_posthoc.texts.sequences import Split, batches


@dataclass(frozen=True)
class blocks:
    """Minimise the square of what each block of base + adapter lacks of the tuned block's output, with Adam.

    Each reads what base + adapter has made by then, so that later blocks repair what earlier ones lost; of the head, KL
    of the logits is minimised. One block of each model is in memory at a time.

    Args:
        lr: Step relative to the root mean square of each factor.
        size: Texts in a batch.
        passes: Over the texts, for each block.
        bf16: Multiply in bfloat16 in the steps; judge in float32 all the same.
    """

    lr: float = 0.05
    size: int = 8
    passes: float = 2.0
    bf16: bool = False
    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, size=self.size, passes=self.passes)

    def __call__(
        self,
        live: Live,
        factors: Mapping[str, Parameter],
        texts: Split,
        *,
        seed: int,
        seconds: float | None,
        progress: bool,
        state: State | None = None,
    ) -> Fit:
        """Fit the factors in place (`Method`)."""
        began, interrupted, done, earlier = time.monotonic(), False, 0, 0.0
        check_steps(factors)
        before, start = finite(live.distances(texts.held_out, size=self.size)), copies(factors)
        # The last judging takes as long as the first.
        end = math.inf if seconds is None else 2 * began + seconds - time.monotonic()
        sides = [sorted(own, key=lambda text: len(text.ids)) for own in (texts.fitted, texts.held_out)]
        fitted, held_out = (list(batches(own, self.size, device=live.device)) for own in sides)
        places = range(len(fitted)), range(len(fitted), len(fitted) + len(held_out))
        steps = max(1, math.ceil(self.passes * len(fitted)))
        moved, entering, reached = set[str](), set[str](), 0
        walk = Walk(chains_of(live), [*fitted, *held_out])
        found = live.together.first(None if state is None else state.fit())
        if found is not None:
            tensors, numbers = found
            put(factors, tensors)
            moved, entering = set(numbers["moved"]), set(numbers["entering"])
            reached, done, earlier = numbers["reached"], numbers["done"], numbers["seconds"]

        def keep() -> None:
            if state is not None:
                numbers = {"moved": sorted(moved), "entering": sorted(entering), "reached": reached}
                taken = earlier + time.monotonic() - began
                state.keep(copies(factors), {**numbers, "done": done, "seconds": taken})

        ended = None
        try:
            with walk:
                total, at = steps * walk.count, steps * reached
                bar = progress_bar(total=total, initial=at, desc="Fitting", unit=" steps", progress=progress)
                with bar:
                    for number, stretch in enumerate(walk.stretches()):
                        if number < reached:
                            continue
                        own = movable_by_steps(_used(stretch, factors))
                        # From each stretch to the next it takes as long as to this one.
                        now = time.monotonic()
                        walking = 0.0 if ended is None else (walk.count - number - 1) * (now - ended)
                        left = live.together.first(end - now - walking)
                        if stretch.role == "entry":
                            entering, own = {*own}, {}
                        if left <= 0:
                            break
                        if own:
                            share = left / (walk.count - number)
                            done += self._fit(live, stretch, own, places, steps, share, seed, bar)
                            moved |= own.keys()
                        reached = number + 1
                        bar.update(steps * reached - bar.n)  # Of those that time, or what it is, left out.
                        if state is not None and state.is_due:
                            keep()
                        ended = time.monotonic()
        except KeyboardInterrupt:
            if live.together.size > 1:
                raise  # The others may be elsewhere.
            interrupted = True
        except BaseException:
            put(factors, start)
            raise
        after, kept = before, True
        if moved:
            if not interrupted:
                keep()  # Judging takes long enough to be interrupted.
            after, kept = kept_or_put_back(live, texts.held_out, self.size, before, factors, start)
        alike = set[str]() if kept else {name for name in moved if torch.equal(factors[name], start[name])}
        reasons = {
            "no step brought its block nearer": alike,
            LATE if reached < walk.count else UNREAD: factors.keys() - moved - entering,
            "it comes before the blocks": entering - moved,
        }
        unmoved = {name: why for why, names in reasons.items() for name in modules_of(names)} | still(factors)
        return Fit(before, after, kept, done, earlier + time.monotonic() - began, interrupted, unmoved, self.lr)

    def _fit(
        self,
        live: Live,
        stretch: Stretch,
        factors: Mapping[str, Parameter],
        places: tuple[Sequence[int], Sequence[int]],
        steps: int,
        seconds: float,
        seed: int,
        bar: Any,
    ) -> int:
        """Move the factors of a stretch, if its output comes nearer on held-out text; the steps come back."""
        began, draw, start = time.monotonic(), random.Random(seed), copies(factors)
        optimizer, done, order = Steps(factors, self.lr), 0, list[int]()
        with stretch.held():
            before = _judged(stretch, places[1])
            seconds -= time.monotonic() - began  # It is judged again.
            try:
                while done < steps:
                    order = order or draw.sample(places[0], len(places[0]))
                    share = live.together.first(max(done / steps, (time.monotonic() - began) / max(seconds, 1e-9)))
                    if share >= 1:
                        break
                    with in_bfloat16(live.device, self.bf16):
                        loss = _loss(stretch, order.pop())
                    if not live.together.first(math.isfinite(loss.item())):
                        break
                    optimizer.step(loss, share)
                    done += 1
                    bar.update()
            except BaseException:
                put(factors, start)
                raise
            if not _judged(stretch, places[1]) < before:
                put(factors, start)
        return done


def _used(stretch: Stretch, factors: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The factors that a stretch computes with."""
    with stretch.held():
        loss = _loss(stretch, 0)
        if not loss.requires_grad:
            return {}
        found = torch.autograd.grad(loss, list(factors.values()), allow_unused=True)
    return {name: own for (name, own), grad in zip(factors.items(), found, strict=True) if grad is not None}


def _loss(stretch: Stretch, place: int) -> Tensor:
    """What a stretch of base + adapter lacks of the tuned model's, on a batch: relative squares, or KL of logits."""
    pieces = stretch.pieces(place)
    total, count = torch.zeros(()), sum(int(piece.counted.sum()) for piece in pieces)
    for piece in pieces:
        mine = piece.run[0]()
        with torch.no_grad():
            theirs = piece.run[1]().to(mine.device)
        if stretch.role == "exit":
            lacking = divergence(mine, theirs, piece.counted) / count
        else:
            mine, theirs = (one.flatten(0, -2)[piece.counted].float() for one in (mine, theirs))
            lacking = (mine - theirs).square().sum() / theirs.square().sum()
        total = total.to(lacking.device) + lacking
    return total


@torch.no_grad()
def _judged(stretch: Stretch, places: Sequence[int]) -> float:
    return sum(_loss(stretch, place).item() for place in places) / len(places)
