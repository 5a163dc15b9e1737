"""Pairs whose deltas have known singular values."""

import torch


def pair_with(deltas, extra_base=(), extra_tuned=()):
    """State dicts whose differences are `deltas`, over a base of norm 100 each."""
    base, tuned = {}, {}
    for name, delta in deltas.items():
        start = torch.zeros_like(delta)
        start[-1] = 100.0 / len(start) ** 0.5 if start.ndim == 2 else 100.0
        base[name], tuned[name] = start, start + delta
    base |= {name: torch.ones(3) for name in extra_base}
    tuned |= {name: torch.ones(3) for name in extra_tuned}
    return base, tuned


def diagonal(*values, side=8):
    delta = torch.zeros(side, side)
    delta.diagonal()[: len(values)] = torch.tensor(values)
    return delta
