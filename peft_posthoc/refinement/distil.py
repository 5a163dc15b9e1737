"""Distillation: an adapter's factors, moved until base + adapter says what the tuned model says."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import Parameter
from tqdm import tqdm

from peft_posthoc.refinement.distance import Score, divergence
from peft_posthoc.refinement.live import Live, says
from peft_posthoc.refinement.method import Fit, better, finite
from peft_posthoc.refinement.sequences import Split, batches, shuffled
from peft_posthoc.refinement.steps import Steps, copies, put


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
        live: Live,
        factors: Mapping[str, Parameter],
        texts: Split,
        *,
        seed: int,
        seconds: float | None,
        progress: bool,
    ) -> Fit:
        """Fit the factors in place (`Method`)."""
        start, (model, wanted) = time.monotonic(), (says(live.adapted), says(live.tuned))

        def judge() -> Score:
            return live.distances(texts.held_out, size=self.size)

        before = finite(judge())
        best, best_factors, kept = before, copies(factors), True
        steps = max(1, math.ceil(self.passes * len(texts.fitted) / self.size))
        every = max(1, steps // 6)
        optimizer = Steps(factors, self.lr)
        done = judged = 0
        interrupted = False
        bar = tqdm(total=steps, desc="Fitting", unit=" steps", disable=not progress)
        try:
            for part in shuffled(texts.fitted, self.size, seed):
                share = done / steps if seconds is None else max(done / steps, (time.monotonic() - start) / seconds)
                if done - judged == every or share >= 1:
                    judged = done
                    if better(now := judge(), best, before):
                        best, best_factors, kept = now, copies(factors), False
                if share >= 1:
                    break
                (batch,) = batches(part, self.size, device=live.device)
                with torch.no_grad():
                    theirs = wanted(batch)
                loss = divergence(model(batch), theirs, batch.mask) / batch.mask.sum()
                if not math.isfinite(value := loss.item()):
                    break  # The steps were too large: what was best before is kept.
                optimizer.step(loss, share)
                done += 1
                bar.update()
                bar.set_postfix(kl=f"{value:.3g}")
        except KeyboardInterrupt:
            interrupted = True
        finally:
            bar.close()
            put(factors, best_factors)
        return Fit(before, best, kept, done, time.monotonic() - start, interrupted)
