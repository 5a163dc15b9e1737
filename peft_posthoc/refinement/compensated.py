"""Reduced-rank regression, a layer at a time: each makes up for what the ones before it lost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from peft_posthoc.linalg.regression import damp, regress, root_of
from peft_posthoc.progress import progress_bar
from peft_posthoc.refinement.chain import chains_of
from peft_posthoc.refinement.layers import Layer, groups_of, layers_of, listed, watched
from peft_posthoc.refinement.method import LATE, UNREAD, Fit, check_positive, finite, kept_or_put_back
from peft_posthoc.refinement.state import State
from peft_posthoc.refinement.steps import copies, put
from peft_posthoc.refinement.walk import Stretch, Walk
from peft_posthoc.running.live import Live
from peft_posthoc.texts.sequences import Split, batches

_MOST = 1e6
"""Of the damping."""


@dataclass(frozen=True)
class compensated:
    """Fit each layer's factors in closed form to what the tuned layer gives, on what base + adapter lets it read.

    Later layers so repair what earlier ones lost. No learning rate, no random numbers; one block of each model is at
    work at a time.

    Args:
        damping: How strongly each layer is drawn to the tuned weights where the text says little, relative to the mean
            square of what it reads.
        size: Texts in a batch.
    """

    damping: float = 0.03
    size: int = 8
    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(damping=self.damping, size=self.size)
        if self.damping > _MOST:
            raise ValueError(
                f"`damping` must be at most {_MOST:g}: more leaves nothing of the text. Got {self.damping}."
            )

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
        began, interrupted, late, earlier = time.monotonic(), False, False, 0.0
        before, start = finite(live.distances(texts.held_out, size=self.size)), copies(factors)
        judging = time.monotonic() - began
        layers = layers_of(live, factors)
        unmoved, fitted = dict(layers.others), set[str]()
        by_length = sorted(texts.fitted, key=lambda text: len(text.ids))
        parts = list(batches(by_length, self.size, device=live.device))
        found = live.together.first(None if state is None else state.fit())
        if found is not None:
            tensors, numbers = found
            put(factors, tensors)
            fitted, unmoved, earlier = set(numbers["fitted"]), numbers["unmoved"], numbers["seconds"]

        def keep() -> None:
            if state is not None:
                taken = earlier + time.monotonic() - began
                state.keep(copies(factors), {"fitted": sorted(fitted), "unmoved": unmoved, "seconds": taken})

        longest = 0.0  # Of the times that a group took.
        bar = progress_bar(
            total=len(layers.linear), initial=len(fitted), desc="Fitting", unit=" layers", progress=progress
        )
        try:
            with Walk(chains_of(live), parts) as walk, torch.no_grad():
                for stretch in walk.stretches():
                    waiting = {k: one for k, one in layers.linear.items() if k not in fitted | unmoved.keys()}
                    groups, odd = _groups(stretch, waiting) if waiting else ([], {})
                    unmoved |= odd
                    for group in groups:
                        turn = time.monotonic()
                        if seconds is not None and live.together.first(turn + longest - began > seconds - judging):
                            raise _OutOfTime
                        if self._fit(stretch, len(parts), group):
                            fitted |= {one.name for one in group}
                        else:
                            unmoved |= dict.fromkeys((one.name for one in group), _NOTHING)
                        bar.update(len(group))
                        longest = max(longest, time.monotonic() - turn)
                        if state is not None and state.is_due:
                            keep()
        except _OutOfTime:
            late = True
        except KeyboardInterrupt:
            if live.together.size > 1:
                raise  # The others may be elsewhere.
            interrupted = True
        except BaseException:
            put(factors, start)
            raise
        finally:
            bar.close()
        if fitted and not interrupted:
            keep()  # Judging takes long enough to be interrupted.
        why = LATE if late or interrupted else UNREAD
        unmoved |= dict.fromkeys(sorted(layers.linear.keys() - fitted - unmoved.keys()), why)
        after, kept = before, True
        if fitted:
            after, kept = kept_or_put_back(live, texts.held_out, self.size, before, factors, start)
        taken = earlier + time.monotonic() - began
        return Fit(before, after, kept, len(fitted), taken, interrupted, unmoved)

    def _fit(self, stretch: Stretch, places: int, group: Sequence[Layer]) -> bool:
        """Fit the layers that read the same; False if they read nothing to go by."""
        with stretch.held():
            gram, crosses = _gathered(stretch, places, group)
            if not damp(gram, crosses, {one.name: one.delta() for one in group}, self.damping):
                return False
        gram = gram.double()
        try:
            root = root_of(gram)
        except ValueError:
            return False
        del gram
        for layer in group:
            found = regress(root, crosses.pop(layer.name), min(layer.rank, *layer.size))
            layer.put(found.a, found.b)
        return True


_NOTHING = "what it reads is zero, no number, or too alike for so little damping"


class _OutOfTime(Exception):
    """What is not fitted by now stays as it is."""


def _groups(stretch: Stretch, layers: Mapping[str, Layer]) -> tuple[list[list[Layer]], dict[str, str]]:
    """The layers that run in a stretch, by what they read and in their order; and why others of it are not fitted."""
    with stretch.held(), listed({name: one.base for name, one in layers.items()}) as calls:
        piece = stretch.pieces(0)[0]
        piece.run[0]()
    times: dict[str, int] = {}
    for name, _ in calls:
        times[name] = times.get(name, 0) + 1
    odd = {name: "it runs more than once" for name, count in times.items() if count > 1}
    for name, read in calls:
        if read.shape[:-1].numel() != len(piece.counted):
            odd[name] = "it does not read every token"
    fitted = [(name, read) for name, read in calls if name not in odd]
    return [[layers[name] for name in group] for group in groups_of(fitted)], odd


def _gathered(stretch: Stretch, places: int, group: Sequence[Layer]) -> tuple[Tensor, dict[str, Tensor]]:
    """`x.T @ x` of what the layers of base + adapter read, and `x.T @ y` of what each lacks of the tuned one's output.

    A batch at a time.
    """
    n, device = group[0].size[1], group[0].a.device
    gram = torch.zeros(n, n, device=device)
    crosses = {one.name: torch.zeros(n, one.size[0], device=device) for one in group}
    sides = [{one.name: getattr(one, side) for one in group} for side in ("base", "tuned")]
    for place in range(places):
        for piece in stretch.pieces(place):
            seen = []
            for side, modules in enumerate(sides):
                with watched(modules) as through:
                    piece.run[side]()
                seen.append(through)
            read = seen[0][group[0].name].inputs[piece.counted].float()
            gram.addmm_(read.mT, read)
            for one in group:
                made, wanted = (side[one.name].outputs.to(device)[piece.counted].float() for side in seen)
                crosses[one.name].addmm_(read.mT, one.lacks(made, wanted))
    return gram, crosses
