r"""The leading singular triplets of a delta, with a certificate, in a few products with it.

Block Krylov iteration with full reorthogonalization (Golub and Van Loan, 10.3; Musco and Musco, 2015). With $A$ the
delta, turned so that its $k = \min(m, n)$ columns are the smaller side, and scaled to norm 1:

$$Z_j = A^\top A Q_j, \quad Q_{j+1} S_j = Z_j - Q Q^\top Z_j, \quad Q = [Q_1 \dots Q_j], \quad T = Q^\top A^\top A Q,$$

from a random orthonormal $Q_1$ of at least $r$ columns. The eigenvalues of $T$ (Ritz values) lie below those of
$A^\top A$, which in a basis that begins with $[Q, Q_{j+1}]$ is

$$\begin{pmatrix} T & C^\top \\ C & D \end{pmatrix}, \qquad C = \begin{pmatrix} 0 & S_j \\ 0 & 0 \end{pmatrix}.$$

If all of the unknown $D$ lies below $d$, then $d I$ in its place only raises eigenvalues (Weyl). What is left is a
small matrix, and the sum of its $r$ largest eigenvalues is at least the energy of the best rank-$r$ approximation:
Lehmann's bound, and our certificate. The iteration goes on until the sum of the Ritz values comes near it. On
power laws the bound came out at 2 to 5 times the truth.
The bound is exact but for `d`, which is estimated (`_lehmann`, `_crowded`): that is the one thing that is not proved.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_posthoc.compute.device import moved
from peft_posthoc.compute.workers import spread
from peft_posthoc.linalg.dense import Problem, Triplets, rayleigh_ritz

if TYPE_CHECKING:
    from jaxtyping import Float

# Steps that random columns need before the certificate can hold, and before it can be trusted.
_RIPE = 5
# Columns of the basis, in ranks, before a check is worth its cost.
_WIDE = 2.8
# `d` is an estimate, so the stated shortfall is this many times the bound. In 1100 random cases, most of them clusters
# around the cut, with blocks as wide as the rank, the truth was at most 0.64 of the bound. With the narrower blocks of
# ranks above 32 (`block`), in 160 certified cases of ranks 40 to 128: at most 0.82 of it.
_SAFETY = 2.0


def block_krylov(
    problem: Problem,
    rank: int | None,
    tolerance: float,
    seed: int,
    *,
    most: float = 1.0,
    max_steps: int | None = None,
    clusters: bool = True,
) -> Triplets | None:
    """Iterate until the certificate holds. If `rank` is None, blocks widen as the rule asks for more.

    Args:
        problem: The delta, and the rule that is asked for the rank.
        rank: The rule's answer, where it is known in advance.
        tolerance: The certificate to be reached.
        seed: Of the random start.
        most: Of the smaller side, the largest share that the basis may take; None is returned where that is not enough.
        max_steps: End there, certified or not.
        clusters: Look for values that are alike in greater number than a block has columns.

    Both of the last are for tests that must see a setting fail that is too weak.
    """
    k = problem.tall.shape[1]
    generator = torch.Generator().manual_seed(seed)

    def noise(columns: int) -> Tensor:
        # Drawn on the CPU, so that the start does not depend on the device.
        drawn = torch.randn(k, columns, generator=generator, dtype=problem.tall.dtype)
        return moved(drawn, problem.tall.device) / math.sqrt(k)

    width = block(rank or 32)
    q = basis = torch.linalg.qr(noise(width)).Q
    images: list[Tensor] = []
    t = basis.new_zeros(0, 0)
    age = 0  # steps since random columns came in
    checked = 0  # columns of the basis at the last check
    while True:
        age += 1
        image, z = problem.there_and_back(q)
        images.append(image)
        h = basis.mT @ z
        t = _bordered(t, h)
        outside = max(1.0 - float(t.trace()), 0.0)
        last = len(images) == max_steps
        # Checks cost more than products when the basis is large: a tenth more columns between them.
        ripe = age >= _RIPE and basis.shape[1] >= max(1.1 * checked, _WIDE * (rank or 0))
        due = False
        if last or ripe or outside < tolerance or (rank is None and age > 1):
            theta, y = (x.flip(-1) for x in torch.linalg.eigh(t))
            r = problem.rank(theta)
            proven = _SAFETY * outside <= tolerance * float(theta[:r].sum())  # too little is left to matter
            crowded = clusters and ripe and not proven and _crowded(theta, r, width)
            if last or not (block(r) > width or crowded):
                due = last or (basis.shape[1] >= r and (ripe or proven))
            else:
                age, width = 0, 2 * width if crowded else min(block(r), 2 * width)
        rest = z - basis @ h
        # Columns that died out, in an invariant subspace, go on as random ones: noise of the size of rounding is all
        # that is left of them. So all of more equal singular values than a block has columns are found.
        rest += noise(rest.shape[1]) * torch.finfo(z.dtype).eps
        new = rest if rest.shape[1] == width else torch.cat([rest, noise(width - rest.shape[1])], dim=1)
        new = _orthonormal(new)
        new = _orthonormal(new - basis @ (basis.mT @ new))  # With `rest` twice, which is enough (Giraud et al., 2005).
        if due:
            checked = basis.shape[1]
            coupling = new.mT @ z
            tail = sum(image.shape[1] for image in images[-2:])
            bound = _lehmann(t, coupling, theta[:r], outside, tail)
            if _SAFETY * bound <= tolerance or last:
                y = y[:, :r]
                u, s, v = rayleigh_ritz(_combined(images, y, problem.parts), basis @ y)
                # `A v = sigma u` by construction; `A.T u - sigma v` lies in the span of the next block.
                off = torch.linalg.vector_norm(coupling @ y[-z.shape[1] :], dim=0) / theta[:r].clamp(min=1e-12).sqrt()
                return Triplets(u, s, v, _SAFETY * bound, off / s[0])
        if basis.shape[1] + new.shape[1] > most * k:
            return None
        q, basis = new, torch.cat([basis, new], dim=1)


def _combined(images: list[Tensor], y: Float[Tensor, "p r"], parts: list[slice]) -> Float[Tensor, "m r"]:
    """The images of the basis, beside each other, times `y`."""
    found = y.new_zeros(len(images[0]), y.shape[1])
    weights = y.split([image.shape[1] for image in images])

    def of_part(part: slice) -> None:
        for image, rows in zip(images, weights, strict=True):
            found[part].addmm_(image[part], rows)

    spread(of_part, parts)
    return found


def _crowded(theta: Float[Tensor, " p"], r: int, width: int) -> bool:
    """Whether nearly as many kept values are nearly equal as a block has columns, so that there may be more of them.

    Block Krylov finds at most `width` of equal values: those alike beyond that leave no trace in what it sees. Of
    about 1100 random spectra each, most of them with a cluster, the worst lost 8e-4 of the energy without this check,
    and 2e-5 with it; no cluster that was overlooked spread over more than 0.2 %.
    """
    span = 3 * width // 4
    later = theta[span : span + r]
    return bool((theta[: len(later)] < 1.02 * later).any())


def _lehmann(
    t: Float[Tensor, "p p"],
    coupling: Float[Tensor, "c b"],
    theta: Float[Tensor, " r"],
    outside: float,
    tail: int,
) -> float:
    """The energy that the best rank-`r` approximation may have over the Ritz values `theta`, relative to theirs.

    The last two blocks are two steps of Lanczos on what was outside of the basis two blocks ago. Their largest Ritz
    value estimates the norm of that, `d`, which exceeds the norm of what is outside by now. One block is too few on
    flat spectra (0.6 of the norm), three delay the certificate by one step.

    Args:
        t: The projection of `A.T @ A` on the basis.
        coupling: From the last block of the basis to the next one.
        theta: The Ritz values to be kept.
        outside: The energy outside of the basis. It alone is the bound where the delta has a low rank.
        tail: Columns of the last two blocks.
    """
    held = float(theta.sum())
    d = min(float(torch.linalg.eigvalsh(t[-tail:, -tail:])[-1]), outside)
    c, b = coupling.shape
    whole = torch.block_diag(t, d * torch.eye(c, dtype=t.dtype, device=t.device))
    whole[-c:, -c - b : -c] = coupling
    whole[-c - b : -c, -c:] = coupling.mT
    most = float(torch.linalg.eigvalsh(whole)[-len(theta) :].clamp(min=d).sum())
    return max(min(most - held, outside), 0.0) / held


def _bordered(t: Float[Tensor, "p p"], h: Float[Tensor, "q b"]) -> Float[Tensor, "q q"]:
    """The symmetric matrix that has `t` in its corner and `h` as its last columns."""
    p = len(t)
    corner = (h[p:] + h[p:].mT) / 2
    return torch.cat([torch.cat([t, h[:p]], dim=1), torch.cat([h[:p].mT, corner], dim=1)])


def _orthonormal(x: Float[Tensor, "k b"]) -> Float[Tensor, "k b"]:
    """Columns that span those of `x`: Cholesky QR, and Householder QR where `x` is too near to losing rank for it.

    Of a 2048 x 128 block Cholesky QR takes 1.8 ms, Householder QR 5 ms (one thread).
    """
    factor, failed = torch.linalg.cholesky_ex(x.mT @ x)
    diagonal = factor.diagonal()
    q: Tensor
    if failed | ~(diagonal.min() > 1e-2 * diagonal.max()):  # A GPU is waited for once.
        q = torch.linalg.qr(x).Q
    else:
        q = torch.linalg.solve_triangular(factor, x.mT, upper=False).mT
    return q


def columns(rank: int) -> int:
    """Columns of the basis that the first check waits for. It is often the last."""
    width = block(rank)
    return width * max(_RIPE, math.ceil(_WIDE * rank / width))


def block(rank: int) -> int:
    """Columns of a block, in units of 16: a product with 8 columns takes as long as one with 16.

    The fewer, the smaller the basis that comes to the tolerance: at rank 512 of 4096 x 4096, 1440 columns in blocks of
    96, 2240 in blocks of 320. But each step reads the delta once, which is much of its time up to some 48 columns.
    """
    return 16 * math.ceil(max(min(rank, 32), min(rank / 2, 48), 3 * rank / 16) / 16)
