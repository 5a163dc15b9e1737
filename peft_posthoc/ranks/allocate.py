"""Ranks of all layers together, within a room."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from peft_posthoc.linalg.spectrum import Spectrum
from peft_posthoc.ranks.weighting import Weighting


def uniform(shapes: Mapping[str, tuple[int, int]], costs: Mapping[str, int], room: int, *, multiple: int = 1) -> int:
    """The largest rank that fits in every layer, where smaller layers have all that they can; 0 if none does.

    Args:
        shapes: By layer.
        costs: By layer, of one triplet.
        room: For all.
        multiple: Of what the rank is one.
    """
    steps = [0, max((min(shape) for shape in shapes.values()), default=0) // multiple]
    while steps[0] < steps[1]:
        middle = -(-sum(steps) // 2)
        fits = sum(min(middle * multiple, *shapes[name]) * costs[name] for name in shapes) <= room
        steps = [middle, steps[1]] if fits else [steps[0], middle - 1]
    return steps[0] * multiple


def allocate(
    spectra: Mapping[str, Spectrum],
    costs: Mapping[str, int],
    room: int,
    weighting: Weighting,
    *,
    least: Mapping[str, int] | int = 1,
    most: int | None = None,
    multiple: int = 1,
) -> dict[str, int]:
    r"""Ranks that keep the most weighted energy within `room`.

    Triplets are taken in the order of what they are worth per byte, $w_l\,\sigma_{li}^2 / c_l$: nothing better fits
    into the room that is used when the first one does not fit. What is still free then goes to those that do, in the
    same order.

    Args:
        spectra: By layer; no layer gets more than is known of it.
        costs: By layer, of one triplet.
        room: For all.
        weighting: What energy is worth in each layer.
        least: The rank that every layer has in any case, or that each has.
        most: The highest rank.
        multiple: Triplets are taken by so many at a time.

    Raises:
        ValueError: There is no room for the least.
    """
    names = list(spectra)
    top = {name: min([len(spectra[name].s), *([most] if most else [])]) for name in names}
    worths = weighting(spectra)
    ranks = {name: min(least if isinstance(least, int) else least[name], top[name]) for name in names}
    free = room - sum(ranks[name] * costs[name] for name in names)
    if free < 0:
        raise ValueError(f"There is room for {room}, and the least takes {room - free}.")
    worth, owners, counts = [], [], []
    for index, name in enumerate(names):
        for part in (spectra[name].s[ranks[name] : top[name]].double() ** 2).split(multiple):
            if len(part):
                worth.append(worths[name] * float(part.mean()) / costs[name])
                owners.append(index)
                counts.append(len(part))
    full: set[int] = set()
    # A stable sort: of equal ones a layer's own come in their order.
    for at in torch.sort(torch.tensor(worth, dtype=torch.float64), descending=True, stable=True).indices.tolist():
        owner, count = owners[at], counts[at]
        cost = count * costs[names[owner]]
        if owner in full or cost > free:
            full.add(owner)
            continue
        ranks[names[owner]] += count
        free -= cost
    return ranks
