"""How long an extraction will take, from a short measurement on this machine."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from peft_posthoc.compute.device import all_of
from peft_posthoc.compute.precision import full_precision
from peft_posthoc.extraction.delta import Pair
from peft_posthoc.extraction.fate import Factored
from peft_posthoc.extraction.prepare import Prepared
from peft_posthoc.extraction.work import outcome_of
from peft_posthoc.linalg.spectrum import in_advance
from peft_posthoc.linalg.svd import cost
from peft_posthoc.models.kinds import LINEAR
from peft_posthoc.models.layout import Place
from peft_posthoc.ranks.rules import fixed

# Values of the weight that is measured with: large enough for the speed of the real ones, and half a second of work.
_MOST = 2**21
# Where a rule looks at the spectrum its rank is not known before.
ASSUMED = 32


def costs(prepared: Prepared) -> dict[str, float]:
    """About how much work each tensor is, as `svd.cost` counts it."""
    plan, exact = prepared.plan, bool(prepared.options["exact"])
    sides = [prepared.base.headers, prepared.tuned.headers]
    found: dict[str, float] = {}
    for name in plan.headers:
        # Reading a value, subtracting and taking norms take as long as a thousand multiplications in a product.
        found[name] = 1e3 * max(math.prod(side[name].shape) for side in sides if name in side)
        if name in plan.carried:
            slot = plan.slot(name)
            found[name] += cost(slot.m, slot.n, in_advance(prepared.rules[name]) or ASSUMED, exact=exact)
    return found


def seconds(prepared: Prepared) -> tuple[float, float]:
    """About how long the work takes: where the deltas are of low rank, and where they are as far from it as noise.

    A small weight of the costliest one's proportions is factored for each.
    """
    plan, exact, work = prepared.plan, bool(prepared.options["exact"]), costs(prepared)
    most = max(plan.carried, key=lambda name: work[name])
    slot = plan.slot(most)
    scale = min(1.0, math.sqrt(_MOST / (slot.m * slot.n)))
    m, n = (max(int(side * scale), min(side, 64)) for side in slot[1:])
    rank = min(in_advance(prepared.rules[most]) or ASSUMED, m, n)
    draw, k = torch.Generator().manual_seed(0), min(m, n, 2 * rank)
    falling = torch.randn(m, k, generator=draw) / torch.arange(1, k + 1) @ torch.randn(k, n, generator=draw)
    noise = torch.randn(m, n, generator=draw)
    devices = all_of(prepared.device)
    at_a_time = torch.get_num_threads() if devices[0].type == "cpu" else len(devices)
    share = sum(work.values()) / (1e3 * m * n + cost(m, n, rank, exact=exact)) / at_a_time
    fate = Factored((Place("measured", LINEAR, "layer"),), fixed(rank))

    def taken(delta: Tensor) -> float:
        base = torch.randn(m, n, generator=draw)
        before, after = (x.to(plan.headers[most].dtype) for x in (base, base + 0.05 * delta))
        start = time.perf_counter()
        outcome_of(Pair("measured", before, after), fate, exact=exact, device=devices[0])
        return share * (time.perf_counter() - start)

    with full_precision():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as a weight is worked on
        try:
            times = sorted(map(taken, (falling + 0.2 * noise, noise)))
        finally:
            torch.set_num_threads(threads)
    return times[0], times[1]
