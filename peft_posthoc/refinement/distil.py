"""Distillation: an adapter's factors, moved until base + adapter says what the tuned model says."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from peft_posthoc.compute.device import in_bfloat16
from peft_posthoc.progress import progress_bar
from peft_posthoc.refinement.method import LATE, UNREAD, Fit, better, check_positive, finite, nearer
from peft_posthoc.refinement.pace import At, Pace
from peft_posthoc.refinement.state import State
from peft_posthoc.refinement.steps import Steps, check_steps, copies, modules_of, put, still
from peft_posthoc.running.live import Live, says
from peft_posthoc.texts.distance import Distance, Model, Score, divergence
from peft_posthoc.texts.sequences import Split, Tokens, batches, shuffled

# Of steps on the task's text; and where the task is only guessed at, so that nearer to the text may be further from it.
_RATE, _GUESSING = 0.05, 0.02
# Of a rate that led away, what is tried next.
_BACK = 0.25


@dataclass(frozen=True)
class distil:
    """Minimise KL(tuned || base + adapter) over the factors, with Adam; the best by held-out text is kept.

    While it only leads away from the start, as where base + adapter is near to the tuned model already and steps are
    too large for that, it goes on from the start in smaller ones.

    Args:
        lr: Step relative to the root mean square of each factor, so that it does not depend on the size of a delta.
            None is 0.05, or 0.02 where nothing is said of the task (`Sampled()`).
        size: Texts in a batch.
        passes: Over the texts.
        shard: Split both models among the processes (PyTorch's FSDP), which then hold a part and a block at a time.
        bf16: Multiply in bfloat16 where text is written and in the steps; judge in float32 all the same. A step keeps
            the base's weights as they were multiplied, with `shard` too: half as much memory as the base takes.
    """

    lr: float | None = None
    size: int = 4
    passes: float = 4.0
    shard: bool = False
    bf16: bool = False
    streams: ClassVar[bool] = False

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
        start, (model, wanted) = time.monotonic(), (says(live.model), says(live.tuned, live.device))
        together = live.together
        check_steps(factors)

        def judge() -> Score:
            return live.distances(texts.held_out, size=self.size)

        before = finite(judge())
        judging = together.first(time.monotonic() - start)
        best, best_factors, kept, interrupted, at, lr = before, copies(factors), True, False, At(), self.lr
        if lr is None:
            lr = _GUESSING if texts.guessed else _RATE
        steps, unread = max(1, math.ceil(self.passes * len(texts.fitted) / self.size)), {*factors}
        optimizer = Steps(factors, lr, together)
        found = together.first(None if state is None else state.fit())
        if found is not None:
            at, best, kept, lr = _restored(*found, factors, best_factors, optimizer)
        pace = Pace(at, seconds and seconds - judging, judging)
        bar = progress_bar(total=steps, initial=at.done, desc="Fitting", unit=" steps", progress=progress)
        try:
            for part in islice(shuffled(texts.fitted, self.size, seed), at.done, None):
                at = pace.at(at.done, steps, at.judged)
                if seconds is not None:
                    at = together.first(at)
                bar.total = pace.steps(at, steps)
                if at.done and at.judged != (due := pace.due(at)):
                    at = at._replace(judged=due)
                    if better(now := judge(), best, before):
                        best, best_factors, kept = now, copies(factors), False
                    elif kept and not nearer(now, before, before):
                        put(factors, best_factors)
                        lr, unread = lr * _BACK, unread & {*optimizer.unread()}
                        optimizer = Steps(factors, lr, together)
                if at.share >= 1:
                    break
                if state is not None and state.is_due:
                    state.keep(*_parts(at, best, kept, lr, factors, best_factors, optimizer))
                with together.agreed():
                    own = together.share(part)
                    # Who has none runs the models all the same: others may need its parts of them.
                    with in_bfloat16(live.device, self.bf16):
                        loss, tokens = _loss(model, wanted, own or part[:1], live.device)
                    if not own:
                        loss, tokens = 0 * loss, 0 * tokens
                    summed = torch.stack([loss.detach(), tokens])
                together.sum([summed])
                if not math.isfinite(value := float(summed[0] / summed[1])):
                    break  # The steps were too large: what was best before is kept.
                optimizer.step(loss / summed[1], at.share)
                at = at._replace(done=at.done + 1)
                bar.update()
                bar.set_postfix(kl=f"{value:.3g}")
        except KeyboardInterrupt:
            if together.size > 1:
                raise  # The others may be elsewhere.
            interrupted = True
        finally:
            bar.close()
            put(factors, best_factors)
        why = UNREAD if at.done * self.size >= len(texts.fitted) else LATE
        unmoved = dict.fromkeys(modules_of(unread & {*optimizer.unread()}), why) | still(factors)
        return Fit(before, best, kept, at.done, at.seconds, interrupted, unmoved, lr)


def _loss(model: Model, wanted: Model, texts: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """The divergence on some texts, a sum over the tokens that count, and how many these are."""
    (batch,) = batches(texts, len(texts), device=device)
    with torch.no_grad():
        theirs = wanted(batch)
    return divergence(model(batch), theirs, batch.counted), batch.counted.sum().float()


def _parts(
    at: At,
    best: Score,
    kept: bool,
    lr: float,
    factors: Mapping[str, Parameter],
    best_factors: Mapping[str, Tensor],
    optimizer: Steps,
) -> tuple[dict[str, Tensor], Any]:
    """All that a fit goes on from, as tensors and plain values."""
    tensors = {
        **{f"now.{name}": own.detach() for name, own in factors.items()},
        **{f"best.{name}": own for name, own in best_factors.items()},
        **{f"adam.{name}": own for name, own in optimizer.tensors().items()},
    }
    return tensors, {"at": at, "best": {kind: asdict(one) for kind, one in best.items()}, "kept": kept, "lr": lr}


def _restored(
    tensors: Mapping[str, Tensor],
    numbers: Any,
    factors: Mapping[str, Parameter],
    best_factors: Mapping[str, Tensor],
    optimizer: Steps,
) -> tuple[At, Score, bool, float]:
    """Put all that into its place again; the numbers come back."""
    groups: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "adam": {}}
    for name, value in tensors.items():
        group, own = name.split(".", 1)
        groups[group][own] = value
    put(factors, groups["now"])
    for name, value in groups["best"].items():
        best_factors[name].copy_(value)
    optimizer.restore(groups["adam"], numbers["lr"])
    best = {kind: Distance(**one) for kind, one in numbers["best"].items()}
    return At(*numbers["at"]), best, numbers["kept"], numbers["lr"]
