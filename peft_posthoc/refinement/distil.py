"""Distillation: an adapter's factors, moved until base + adapter says what the tuned model says."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from peft_posthoc.errors import PosthocError
from peft_posthoc.refinement.distance import Distance, Model, distances, divergence
from peft_posthoc.refinement.movable import put
from peft_posthoc.refinement.sequences import Kind, Split, batches, shuffled

Score = Mapping[Kind, Distance]


@dataclass(frozen=True)
class Fit:
    """What a method has come to."""

    before: Score
    """On held-out text, of the factors as they were."""
    after: Score
    """Of those that are in the model now."""
    kept: bool
    """Whether the factors are as they were: none that were tried is better."""
    steps: int
    seconds: float
    interrupted: bool = False
    """Whether Ctrl-C ended it; what was best by then is in the model."""


@dataclass(frozen=True)
class distil:
    """Minimise KL(tuned || base + adapter) over the factors, with Adam; the best by held-out text is kept.

    Args:
        lr: Step relative to the root mean square of each factor, so that it does not depend on the size of a delta.
        size: Texts in a batch.
        passes: Over the texts.
    """

    lr: float = 0.05
    size: int = 8
    passes: float = 2.0

    def __call__(
        self,
        model: Model,
        wanted: Model,
        factors: Mapping[str, Parameter],
        texts: Split,
        *,
        seed: int,
        seconds: float | None,
        device: torch.device,
        progress: bool,
    ) -> Fit:
        """Fit the factors in place.

        Args:
            model: Base + adapter, of these factors.
            wanted: The tuned model.
            factors: What is moved, by name.
            texts: To fit on, and to judge by.
            seed: Of the order of the texts.
            seconds: When to stop at the latest.
            device: Where the models are.
            progress: Show a progress bar on stderr.

        Raises:
            PosthocError: The outputs of a model are not finite.
        """
        start = time.monotonic()

        def judge() -> Score:
            return distances(model, wanted, texts.held_out, size=self.size, device=device)

        before = judge()
        if not all(math.isfinite(distance.kl) for distance in before.values()):
            raise PosthocError("The tuned model, or base + adapter, says what is no number on the held-out text.")
        best, best_factors, kept = before, _copies(factors), True
        steps = max(1, math.ceil(self.passes * len(texts.fitted) / self.size))
        every = max(1, steps // 6)
        optimizer = torch.optim.Adam(
            [{"params": [own], "size": _size(own)} for own in factors.values() if own.any()], lr=0.0
        )
        done = judged = 0
        interrupted = False
        bar = tqdm(total=steps, desc="Fitting", unit=" steps", disable=not progress)
        try:
            for part in shuffled(texts.fitted, self.size, seed):
                share = done / steps if seconds is None else max(done / steps, (time.monotonic() - start) / seconds)
                if done - judged == every or share >= 1:
                    judged = done
                    if _better(now := judge(), best, before):
                        best, best_factors, kept = now, _copies(factors), False
                if share >= 1:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * group["size"] * _pace(share)
                (batch,) = batches(part, self.size, device=device)
                with torch.no_grad():
                    theirs = wanted(batch)
                loss = divergence(model(batch), theirs, batch.mask) / batch.mask.sum()
                if not math.isfinite(value := loss.item()):
                    break  # The steps were too large: what was best before is kept.
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                bar.update()
                bar.set_postfix(kl=f"{value:.3g}")
        except KeyboardInterrupt:
            interrupted = True
        finally:
            bar.close()
            put(factors, best_factors)
        return Fit(before, best, kept, done, time.monotonic() - start, interrupted)


def _size(factor: Tensor) -> float:
    """Root mean square of a factor's values that are not padding."""
    values = factor.detach()
    return float(values.norm() / max(1, int(values.count_nonzero())) ** 0.5)


def _pace(share: float) -> float:
    """The rate after a share of the way: up within a twentieth, then down along a cosine."""
    return min(1.0, (share + 0.01) / 0.05) * 0.5 * (1 + math.cos(math.pi * share))


def _copies(factors: Mapping[str, Parameter]) -> dict[str, Tensor]:
    return {name: own.detach().clone() for name, own in factors.items()}


def _better(now: Score, best: Score, start: Score) -> bool:
    """Whether no kind of text is further off than at the start, and all together are nearer than the best."""
    if any(not now[kind].kl <= start[kind].kl for kind in start):
        return False
    return _mean(now, start) < _mean(best, start)


def _mean(score: Score, start: Score) -> float:
    """The distance against the start's, a mean over the kinds of text."""
    return sum(score[kind].kl / start[kind].kl if start[kind].kl else 1.0 for kind in start) / len(start)
