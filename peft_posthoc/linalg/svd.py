"""Matrices to factors: the best low-rank approximation of one weight delta, with a certificate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_posthoc.compute.precision import full_precision
from peft_posthoc.linalg.dense import Problem, Triplets, gram, lapack
from peft_posthoc.linalg.krylov import block_krylov, columns
from peft_posthoc.linalg.lowrank import LowRank, share
from peft_posthoc.linalg.norms import frobenius_norm
from peft_posthoc.linalg.spectrum import RankRule, in_advance

if TYPE_CHECKING:
    from jaxtyping import Float

# Up to this side LAPACK's full SVD costs no more than the iteration.
_SMALL = 256
# A basis of more than this share of the smaller side costs more than all eigenvectors of the Gram matrix. One thread,
# Gram matrix against iteration: 1.0 s and 0.7 s at 4096 x 2048 and rank 384 (0.5 of the side), 1.15 s and 1.2 s at rank
# 512 (0.7), 1.6 s and 1.7 s at 8192 x 2048.
_FULL = 0.65


@torch.no_grad()
def truncated_svd(
    delta: Float[Tensor, "m n"],
    rank: int | RankRule,
    *,
    exact: bool = False,
    tolerance: float = 1e-4,
    seed: int = 0,
    norm: float | None = None,
) -> LowRank:
    r"""Factor a weight delta into LoRA matrices.

    With $\Delta W = U \Sigma V^\top$, returns $B = U_r \Sigma_r^{1/2}$ and $A = \Sigma_r^{1/2} V_r^\top$ (PHLoRA,
    eq. 4). $B A$ is the best rank-$r$ approximation of $\Delta W$ in the Frobenius norm (Eckart and Young, 1936), but
    for a share `tolerance` of its energy. The largest entry of each right singular vector is positive.

    Args:
        delta: The tuned weight minus the base weight: `m` output features by `n` input features, as `torch.nn.Linear`
            stores them. Any floating dtype; it is not modified, nor copied if float32 or float64.
        rank: How many singular triplets to keep, from 1 to `min(m, n)`; or a rule such as `keep_energy(0.9)`.
        exact: Take LAPACK's full SVD, whatever it costs.
        tolerance: The energy that may be missed, relative to that of the best approximation of the same rank.
        seed: Of the random start. The same seed gives the same bits on the same machine.
        norm: `||delta||_F`, where it is known already: it saves one pass over the delta.

    Returns:
        The factors, on `delta`'s device, in float32 (float64 if `delta` is float64). A zero delta gives zero factors,
        of rank 1 under a rule.

    Raises:
        ValueError: `rank` is out of range, or `delta` holds NaN or infinity.
    """
    m, n = delta.shape
    if callable(rank) and (known := in_advance(rank)) is not None:
        rank = min(known, m, n)  # so that the first block is wide enough
    rule = rank if callable(rank) else _always(rank, m, n)
    work = delta if delta.dtype in (torch.float32, torch.float64) else delta.float()
    norm = frobenius_norm(work) if norm is None else norm
    if not math.isfinite(norm):
        raise ValueError(
            "`truncated_svd(delta=...)` must be finite. Got NaN or infinity: look for a broken checkpoint."
        )
    if norm == 0:
        r = 1 if callable(rank) else rank
        zeros = torch.zeros(r, dtype=torch.float64)
        return LowRank(work.new_zeros(r, n), work.new_zeros(m, r), zeros, 0.0, 0.0, 0.0, zeros)

    problem = Problem(work if m >= n else work.mT, norm, rule, (m, n))
    with full_precision(), torch.autocast(work.device.type, enabled=False):
        found = _solve(problem, None if callable(rank) else rank, exact, tolerance, seed)
    u, v = (found.u, found.v) if m >= n else (found.v, found.u)
    sign = v.gather(0, v.abs().argmax(dim=0, keepdim=True)).sign()
    s = found.s.double() * norm
    root = s.sqrt().to(v.dtype) * sign
    return LowRank(
        a=(v * root).mT.contiguous(),
        b=(u * root).contiguous(),
        s=s.cpu(),
        energy=share(s, norm),
        norm=norm,
        shortfall=found.shortfall,
        residual=found.residual.double().cpu(),
    )


def _solve(problem: Problem, rank: int | None, exact: bool, tolerance: float, seed: int) -> Triplets:
    """The cheapest way that leads to the tolerance."""
    k = problem.tall.shape[1]
    # Beyond these bounds `x / norm` leaves float32; LAPACK scales by itself.
    if exact or k <= _SMALL or not 1e-30 < problem.norm < 1e30:
        return lapack(problem)
    found = None
    if _narrow(rank or 32, k):
        found = block_krylov(problem, rank, tolerance, seed, most=_FULL)
    return gram(problem) if found is None else found


def cost(m: int, n: int, rank: int, *, exact: bool = False) -> float:
    """About how much work one delta is, to share out many evenly: in the multiplications and additions of products.

    Within a factor of two of what was measured, for ranks 32 to 512 of sides 2048 to 14336.
    """
    m, k = max(m, n), min(m, n)
    if exact or k <= _SMALL:
        return 8.0 * m * k**2 + 40.0 * k**3
    if not _narrow(rank, k):
        return 2.0 * m * k**2 + 16.0 * k**3
    p = columns(rank)
    return 4.0 * m * k * p + 6.0 * k * p**2 + 24.0 * p**3


def _narrow(rank: int, k: int) -> bool:
    """Whether the iteration can come to its end before its basis is too large."""
    return columns(rank) <= _FULL * k


def _always(rank: int, m: int, n: int) -> RankRule:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(m, n):
        raise ValueError(
            f"`truncated_svd(rank=...)` must lie between 1 and {min(m, n)}, "
            f"the smaller side of a delta of shape {(m, n)}. Got {rank!r}."
        )
    return lambda spectrum: rank
