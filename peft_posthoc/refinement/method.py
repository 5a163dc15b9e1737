"""What a way to fit factors is given and gives: `distil`, `compensated` and `blocks` are called the same way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor
from torch.nn import Parameter

from peft_posthoc.errors import PosthocError
from peft_posthoc.refinement.state import State
from peft_posthoc.refinement.steps import put
from peft_posthoc.running.live import Live
from peft_posthoc.texts.distance import Score
from peft_posthoc.texts.sequences import Split, Tokens

UNREAD, LATE = "no text comes to it", "its turn did not come"
"""Why factors stay as they are: of what models do without where they read, such as what sees images; and where the time
was over first."""


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
    """Of an optimiser; of a closed form, the modules that were fitted."""
    seconds: float
    interrupted: bool = False
    """Whether Ctrl-C ended it; what was best by then is in the model."""
    unmoved: Mapping[str, str] = field(default_factory=dict)
    """Modules that the method cannot fit, and why: their factors are as they were."""
    lr: float | None = None
    """Of the last steps: as asked for, the default, or less where that led away. A closed form has none."""


class Method(Protocol):
    """A way to fit an adapter's factors to the tuned model: a frozen dataclass of its settings."""

    @property
    def size(self) -> int:
        """Texts in a batch."""

    @property
    def streams(self) -> bool:
        """Whether it has a block of each model at work at a time, so that neither need fit into memory."""

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
        """Fit the factors in place.

        Args:
            live: Both models.
            factors: What is moved, by name: parameters of base + adapter.
            texts: To fit on, and to judge by.
            seed: Of all that is drawn.
            seconds: How long it may take, judging included.
            progress: Show a progress bar on stderr.
            state: Where it keeps what it goes on from after an interruption.

        Raises:
            PosthocError: The outputs of a model are not finite.
        """


def finite(score: Score) -> Score:
    """The score of the start.

    Raises:
        PosthocError: It is no number.
    """
    if not all(math.isfinite(distance.kl) for distance in score.values()):
        raise PosthocError("The tuned model, or base + adapter, says what is no number on the held-out text.")
    return score


def kept_or_put_back(
    live: Live,
    held_out: Sequence[Tokens],
    size: int,
    before: Score,
    factors: Mapping[str, Parameter],
    start: Mapping[str, Tensor],
) -> tuple[Score, bool]:
    """Judge the factors, and put those of the start back if they are no better.

    Returns:
        The score of those that are in the model then, and whether they are the start's.
    """
    after = live.distances(held_out, size=size)
    if better(after, before, before):
        return after, False
    put(factors, start)
    return before, True


def check_positive(**values: float | None) -> None:
    """See that numbers, by their names, are more than 0 and finite; None is whatever is usual.

    Raises:
        ValueError: One is not.
    """
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be more than 0, and finite. Got {value}.")


def better(now: Score, best: Score, start: Score) -> bool:
    """Whether no kind of text is further off than at the start, and all together are nearer than the best."""
    if any(not now[kind].kl <= start[kind].kl for kind in start):
        return False
    return nearer(now, best, start)


def nearer(now: Score, best: Score, start: Score) -> bool:
    """Whether all kinds of text together are nearer than the best."""
    return _mean(now, start) < _mean(best, start)


def _mean(score: Score, start: Score) -> float:
    """The distance against the start's, a mean over the kinds of text."""
    return sum(score[kind].kl / start[kind].kl if start[kind].kl else 1.0 for kind in start) / len(start)
