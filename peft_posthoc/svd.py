r"""Matrices to factors: the best low-rank approximation of one weight delta, with a certificate.

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

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from peft_posthoc.rank import RankRule, Spectrum, fixed

# Up to this side LAPACK's full SVD costs no more than the iteration.
_SMALL = 256
# A basis of more than this share of the smaller side costs more than all eigenvectors of the Gram matrix.
_FULL = 0.5
# Steps that random columns need before the certificate can hold, and before it can be trusted.
_RIPE = 5
# Columns of the basis, in ranks, before a check is worth its cost.
_WIDE = 4
# `d` is an estimate, so the stated shortfall is this many times the bound. In 1100 random cases, most of them clusters
# around the cut, with blocks as wide as the rank, the truth was at most 0.64 of the bound. With the narrower blocks of
# ranks above 64 (`_block`), 120 such cases: never above what was stated.
_SAFETY = 2.0


class LowRank(NamedTuple):
    """The rank-`r` approximation `b @ a` of one weight delta, and how good it is."""

    a: Float[Tensor, "r n"]
    """`sqrt(s) * vh`: PEFT's `lora_A`."""
    b: Float[Tensor, "m r"]
    """`u * sqrt(s)`: PEFT's `lora_B`."""
    s: Float[Tensor, " r"]
    """The kept singular values, in descending order, float64 on the CPU."""
    energy: float
    """Share of `||delta||_F^2` that `b @ a` keeps, in [0, 1] (E_r of PHLoRA, eq. 5). 0 for a zero delta."""
    norm: float
    """`||delta||_F`, summed in float64."""
    shortfall: float
    """Certificate: the energy missed against the best rank-`r` approximation is at most this share of its energy.

    Up to rounding, 2e-6 in float32. 0 from a full decomposition.
    """
    residual: Float[Tensor, " r"]
    """Of each triplet, the larger of `||delta @ v - sigma u||` and `||delta.T @ u - sigma v||`, relative to the largest
    sigma: some singular value of the delta is this near. Float64 on the CPU."""

    def cut(self, rank: int) -> LowRank:
        """The factors of a smaller rank: the `rank` leading triplets.

        Raises:
            ValueError: `rank` lies outside of 1 to the rank held.
        """
        held = len(self.s)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= held:
            raise ValueError(f"`LowRank.cut(rank=...)` must lie between 1 and {held}, the rank held. Got {rank!r}.")
        energy = _share(self.s[:rank], self.norm)
        # Every Ritz value lies below its singular value: some of them together miss no more energy than all.
        shortfall = self.shortfall * self.energy / energy if energy else 0.0
        return LowRank(
            self.a[:rank], self.b[:, :rank], self.s[:rank], energy, self.norm, shortfall, self.residual[:rank]
        )


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
    if isinstance(rank, fixed):
        rank = min(rank.rank, m, n)  # known in advance, so that the first block is wide enough
    rule = rank if callable(rank) else _always(rank, m, n)
    work = delta if delta.dtype in (torch.float32, torch.float64) else delta.float()
    norm = _frobenius_norm(work) if norm is None else norm
    if not math.isfinite(norm):
        raise ValueError(
            "`truncated_svd(delta=...)` must be finite. Got NaN or infinity: look for a broken checkpoint."
        )
    if norm == 0:
        r = 1 if callable(rank) else rank
        zeros = torch.zeros(r, dtype=torch.float64)
        return LowRank(work.new_zeros(r, n), work.new_zeros(m, r), zeros, 0.0, 0.0, 0.0, zeros)

    problem = _Problem(work if m >= n else work.mT, norm, rule, (m, n))
    with _full_precision(work.device):
        # Beyond these bounds `x / norm` leaves float32; LAPACK scales by itself.
        if exact or min(m, n) <= _SMALL or not 1e-30 < norm < 1e30:
            found = _lapack(problem)
        else:
            found = _krylov(problem, None if callable(rank) else rank, tolerance, seed)
    u, v = (found.u, found.v) if m >= n else (found.v, found.u)
    sign = v.gather(0, v.abs().argmax(dim=0, keepdim=True)).sign()
    s = found.s.double() * norm
    root = s.sqrt().to(v.dtype) * sign
    return LowRank(
        a=(v * root).mT.contiguous(),
        b=(u * root).contiguous(),
        s=s.cpu(),
        energy=_share(s, norm),
        norm=norm,
        shortfall=found.shortfall,
        residual=found.residual.double().cpu(),
    )


class _Problem(NamedTuple):
    """A delta, turned so that it is at least as tall as wide, and what is asked of it."""

    tall: Float[Tensor, "m k"]
    norm: float
    rule: RankRule
    shape: tuple[int, int]

    def times(self, x: Float[Tensor, "k b"]) -> Float[Tensor, "m b"]:
        """`A @ x`, where `A` is the delta scaled to norm 1."""
        return _product(self.tall, x / self.norm)

    def transposed_times(self, x: Float[Tensor, "m b"]) -> Float[Tensor, "k b"]:
        """`A.T @ x`."""
        return _product(self.tall.mT, x) / self.norm

    def rank(self, theta: Float[Tensor, " known"]) -> int:
        """The rule's answer to the leading eigenvalues of `A.T @ A`."""
        s = theta.double().cpu().clamp(min=0).sqrt() * self.norm
        return min(max(self.rule(Spectrum(s, self.norm**2, self.shape)), 1), self.tall.shape[1])


class _Triplets(NamedTuple):
    """Leading singular triplets of `A`, and the certificate."""

    u: Float[Tensor, "m r"]
    s: Float[Tensor, " r"]
    v: Float[Tensor, "k r"]
    shortfall: float
    residual: Float[Tensor, " r"]


def _lapack(problem: _Problem) -> _Triplets:
    """The full SVD; should it not converge, in float64, and then from the Gram matrix in float64."""
    dtype = problem.tall.dtype
    for tall in (problem.tall, problem.tall.double()):
        with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            u, s, vh = torch.linalg.svd(tall, full_matrices=False)
            s = s.double() / problem.norm
            r = problem.rank(s**2)
            u, s, v = u[:, :r].to(dtype), s[:r].to(dtype), vh[:r].mT.to(dtype)
            return _Triplets(u, s, v, 0.0, _residual(problem, u, s, v))
    found = _gram(problem._replace(tall=problem.tall.double()))
    return found._replace(u=found.u.to(dtype), s=found.s.to(dtype), v=found.v.to(dtype))


def _gram(problem: _Problem) -> _Triplets:
    """Rayleigh-Ritz on the whole space: all eigenvectors of the Gram matrix, so that none is missed.

    2.6 times faster than the full SVD at 2048 x 2048 in float32 (one thread).
    """
    theta, y = torch.linalg.eigh((problem.tall.mT @ problem.tall) / problem.norm**2)
    v = y.flip(1)[:, : problem.rank(theta.flip(0))]
    u, s, v = _rayleigh_ritz(problem.times(v), v)
    return _Triplets(u, s, v, 0.0, _residual(problem, u, s, v))


def _krylov(
    problem: _Problem, rank: int | None, tolerance: float, seed: int, *, max_steps: int | None = None
) -> _Triplets:
    """Block Krylov until the certificate holds. If `rank` is None, blocks widen as the rule asks for more.

    With `max_steps` it ends there, certified or not: a setting too weak, for tests that must see it fail.
    """
    k = problem.tall.shape[1]
    generator = torch.Generator().manual_seed(seed)

    def noise(columns: int) -> Tensor:
        # Drawn on the CPU, so that the start does not depend on the device.
        drawn = torch.randn(k, columns, generator=generator, dtype=problem.tall.dtype)
        return drawn.to(problem.tall.device) / math.sqrt(k)

    width = _block(rank or 32)
    if _RIPE * max(width, rank or 0) > _FULL * k:
        return _gram(problem)
    q = basis = torch.linalg.qr(noise(width)).Q
    images: list[Tensor] = []
    t = basis.new_zeros(0, 0)
    age = 0  # steps since random columns came in
    checked = 0  # columns of the basis at the last check
    while True:
        age += 1
        images.append(problem.times(q))
        z = problem.transposed_times(images[-1])
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
            crowded = ripe and not proven and _crowded(theta, r, width)
            if last or not (_block(r) > width or crowded):
                due = last or (basis.shape[1] >= r and (ripe or proven))
            else:
                age, width = 0, 2 * width if crowded else min(_block(r), 2 * width)
        rest = z - basis @ h
        # Columns that died out, in an invariant subspace, go on as random ones: noise of the size of rounding is all
        # that is left of them. So all of more equal singular values than a block has columns are found.
        rest += noise(rest.shape[1]) * torch.finfo(z.dtype).eps
        new = torch.cat([rest, noise(width - rest.shape[1])], dim=1)
        for _ in range(2):  # Twice is enough (Giraud et al., 2005).
            new = _orthonormal(new - basis @ (basis.mT @ new))
        if due:
            checked = basis.shape[1]
            coupling = new.mT @ z
            tail = sum(image.shape[1] for image in images[-2:])
            bound = _lehmann(t, coupling, theta[:r], outside, tail)
            if _SAFETY * bound <= tolerance or last:
                y = y[:, :r]
                parts = zip(images, y.split([image.shape[1] for image in images]), strict=True)
                u, s, v = _rayleigh_ritz(torch.stack([image @ part for image, part in parts]).sum(dim=0), basis @ y)
                # `A v = sigma u` by construction; `A.T u - sigma v` lies in the span of the next block.
                off = torch.linalg.vector_norm(coupling @ y[-z.shape[1] :], dim=0) / theta[:r].clamp(min=1e-12).sqrt()
                return _Triplets(u, s, v, _SAFETY * bound, off / s[0])
        if basis.shape[1] + new.shape[1] > _FULL * k:
            return _gram(problem)
        q, basis = new, torch.cat([basis, new], dim=1)


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
    if failed or not diagonal.min() > 1e-2 * diagonal.max():
        q = torch.linalg.qr(x).Q
    else:
        q = torch.linalg.solve_triangular(factor, x.mT, upper=False).mT
    return q


def _rayleigh_ritz(
    image: Float[Tensor, "m r"], v: Float[Tensor, "k r"]
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "k r"]]:
    """The singular triplets of `A` on span(v), from `image = A @ v`. No squares: the small ones are right as well."""
    u, s, rotation = torch.linalg.svd(image, full_matrices=False)
    return u, s, v @ rotation.mT


def _residual(problem: _Problem, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    right, left = problem.times(v) - u * s, problem.transposed_times(u) - v * s
    return torch.maximum(torch.linalg.vector_norm(right, dim=0), torch.linalg.vector_norm(left, dim=0)) / s[0]


def _product(a: Float[Tensor, "m n"], x: Float[Tensor, "n b"]) -> Float[Tensor, "m b"]:
    """`a @ x` in the form that reads `a` in the order of memory: 1.1 to 1.4 times faster for 16 to 160 columns."""
    return a @ x if a.stride(1) == 1 else (x.mT @ a.mT).mT


def _block(rank: int) -> int:
    """Columns of a block, in units of 16: a product with 8 columns takes as long as one with 16.

    The rank up to 64, and 5/8 of it beyond: at rank 128, 80 columns take 7 steps where 144 take 5, and 0.7 of the time
    (2048 x 2048 and 8192 x 2048, one thread); at rank 32 narrower blocks save nothing.
    """
    return 16 * math.ceil(rank / 16 if rank <= 64 else rank / 25.6)


def _always(rank: int, m: int, n: int) -> RankRule:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(m, n):
        raise ValueError(
            f"`truncated_svd(rank=...)` must lie between 1 and {min(m, n)}, "
            f"the smaller side of a delta of shape {(m, n)}. Got {rank!r}."
        )
    return lambda spectrum: rank


def _frobenius_norm(x: Float[Tensor, "m n"]) -> float:
    # In slices: one reduction in float64 would first copy all of a float32 `x`.
    rows = x if x.stride(1) == 1 else x.mT
    squares = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square().sum() for part in rows.split(64)]
    return math.sqrt(float(torch.stack(squares).sum()))


def _share(s: Float[Tensor, " r"], norm: float) -> float:
    return min(float(((s / norm) ** 2).sum()), 1.0) if norm else 0.0


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products in full float32, whatever a trainer around us has set: the three digits of TF32 certify nothing."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
