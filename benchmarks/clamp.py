"""What it costs to clamp factors at a quantile, as extractors for image models do: `clamp.py BASE TUNED [RANK]`.

They put the singular values into the left factor, take the 0.99 quantile of the entries of both factors as the bound,
and cut both off at plus and minus it. Every tenth matrix of two files of safetensors is factored; a line has the share
of the delta's energy that is kept without the clamp and with it.
"""

from __future__ import annotations

import sys

import torch
from safetensors import safe_open

QUANTILE = 0.99


def kept(delta: torch.Tensor, rank: int) -> tuple[float, float]:
    """The energy kept by the truncated SVD, and by the same with its factors clamped; the latter may be negative."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    b, a = u[:, :rank] * s[:rank], vh[:rank]
    entries = torch.cat([b.flatten(), a.flatten()]).sort().values
    most = entries[int(QUANTILE * (len(entries) - 1))]
    whole = delta.square().sum()
    shares = (
        1 - (delta - left @ right).square().sum() / whole
        for left, right in ((b, a), (b.clamp(-most, most), a.clamp(-most, most)))
    )
    plain, clamped = (float(share) for share in shares)
    return plain, clamped


if __name__ == "__main__":
    rank = int(sys.argv[3]) if len(sys.argv) > 3 else 32
    base, tuned = (safe_open(file, "pt") for file in sys.argv[1:3])
    names = [name for name in base.keys() if len(base.get_slice(name).get_shape()) == 2]  # noqa: SIM118
    found = []
    for name in names[::10]:
        delta = tuned.get_tensor(name).float() - base.get_tensor(name).float()
        if min(delta.shape) >= rank and delta.any() and max(delta.shape) < 8192:
            found.append(kept(delta, rank))
            print(f"{name:<60} {found[-1][0]:8.4f} {found[-1][1]:8.4f}")
    plain, clamped = (sum(column) / len(found) for column in zip(*found, strict=True))
    print(f"{f'mean of {len(found)} at rank {rank}':<60} {plain:8.4f} {clamped:8.4f}")
