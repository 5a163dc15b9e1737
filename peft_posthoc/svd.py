r"""Matrices to factors: the best low-rank approximation of one weight delta, with a certificate.

Block Krylov iteration with full reorthogonalization (Musco and Musco, 2015; Golub and Van Loan, section 10.3). With $A$
the delta, turned so that its $k = \min(m, n)$ columns are the smaller side:

    Q_1           a random orthonormal k x b block, b > r
    Z_j           A^T A Q_j
    Q_{j+1} S_j   Z_j less its part in span(Q_1 ... Q_j)

and Rayleigh-Ritz on the basis $Q = [Q_1 \dots Q_j]$: the eigenpairs of $T = Q^T A^T A Q$. In exact arithmetic

    A^T A  =  [ T        S_j^T  0 ]     in the basis [Q, Q_{j+1}, ...], where D, the part of A^T A on all that is orthogonal
              [ S_j            D  ]     to Q, is unknown but for its trace, ||A||_F^2 - tr T.
              [ 0                 ]

If $D \preceq d I$, then putting $d I$ for $D$ raises every eigenvalue (Weyl), and only a small matrix is left: the sum of
its $r$ largest eigenvalues bounds the energy of the best rank-$r$ approximation (Lehmann's bound). That is the certificate.
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

# LAPACK takes 10 ms for 256 x 256, about what five steps of the iteration do.
_SMALL = 256
# Past this share of the smaller side, the eigenvalues of the whole Gram matrix cost less than those of the growing basis.
_FULL = 0.6
# `d` is itself estimated; the stated shortfall is this many times the bound that follows from the estimate.
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
    """The certificate: energy missed against the best rank-`r` approximation, relative to that one's energy, at most."""
    residual: float
    """The largest `||delta @ v - sigma * u||` or `||delta.T @ u - sigma * v||` kept, relative to the largest sigma."""

    def cut(self, rank: int) -> LowRank:
        """The factors of a smaller rank: the `rank` leading triplets.

        `shortfall` is restated relative to the energy that is left, so it still holds.

        Raises:
            ValueError: `rank` lies outside of 1 to the rank held.
        """
        held = len(self.s)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= held:
            raise ValueError(f"`LowRank.cut(rank=...)` must lie between 1 and {held}, the rank held. Got {rank!r}.")
        energy = _share(self.s[:rank], self.norm)
        # The triplets that are cut off may hide no more than all of them miss together.
        shortfall = self.shortfall * self.energy / energy if energy else 0.0
        return self._replace(a=self.a[:rank], b=self.b[:, :rank], s=self.s[:rank], energy=energy, shortfall=shortfall)


@torch.no_grad()
def truncated_svd(
    delta: Float[Tensor, "m n"], rank: int | RankRule, *, exact: bool = False, tolerance: float = 1e-4, seed: int = 0
) -> LowRank:
    r"""Factor a weight delta into LoRA matrices.

    With $\Delta W = U \Sigma V^\top$, returns $B = U_r \Sigma_r^{1/2}$ and $A = \Sigma_r^{1/2} V_r^\top$ (PHLoRA, eq. 4).
    $B A$ is the best rank-$r$ approximation of $\Delta W$ in the Frobenius norm (Eckart and Young, 1936), up to a relative
    `tolerance` of its energy. The sign of each pair of singular vectors makes the largest entry of $v$ positive.

    Args:
        delta: The tuned weight minus the base weight: `m` output features by `n` input features, as `torch.nn.Linear`
            stores them. Any floating dtype; it is not modified, nor copied if float32 or float64.
        rank: How many singular triplets to keep, from 1 to `min(m, n)`; or a rule such as `keep_energy(0.9)`.
        exact: Take LAPACK's full SVD whatever it costs.
        tolerance: The energy that may be missed, relative to that of the best approximation of the same rank.
        seed: Of the random start. The same seed gives the same bits on the same machine.

    Returns:
        The factors, on `delta`'s device, in float32 (float64 if `delta` is float64). A zero delta gives zero factors, of
        rank 1 under a rule.

    Raises:
        ValueError: `rank` is out of range, or `delta` holds NaN or infinity.
    """
    m, n = delta.shape
    rule = rank if callable(rank) else _fixed_within(rank, (m, n))
    work = delta if delta.dtype in (torch.float32, torch.float64) else delta.float()
    norm = _frobenius(work)
    if not math.isfinite(norm):
        raise ValueError("`truncated_svd(delta=...)` must be finite. Got NaN or infinity: is one of the weights broken?")
    if norm == 0:
        r = 1 if callable(rank) else rank
        zeros = torch.zeros(r, dtype=torch.float64)
        return LowRank(work.new_zeros(r, n), work.new_zeros(m, r), zeros, 0.0, 0.0, 0.0, 0.0)
    tall = work if m >= n else work.mT
    # Within these bounds float32 holds 1 / norm; LAPACK scales by itself.
    exact = exact or min(m, n) <= _SMALL or not 1e-30 < norm < 1e30
    with _full_precision(work.device):
        if exact:
            found = _lapack(tall, norm, rule, (m, n))
        else:
            found = _krylov(tall, norm, rule, (m, n), tolerance, seed, block=_block(1 if callable(rank) else rank))
    u, s, v, shortfall, residual = found
    if m < n:
        u, v = v, u
    sign = v.gather(0, v.abs().argmax(dim=0, keepdim=True)).sign()
    root = s.clamp(min=0).sqrt() * math.sqrt(norm)
    values = s.double().cpu() * norm
    return LowRank(
        a=((v * sign) * root).mT.contiguous(),
        b=((u * sign) * root).contiguous(),
        s=values,
        energy=_share(values, norm),
        norm=norm,
        shortfall=shortfall,
        residual=residual,
    )


class _Triplets(NamedTuple):
    """Leading singular triplets of a tall matrix divided by its Frobenius norm."""

    u: Float[Tensor, "m r"]
    s: Float[Tensor, " r"]
    v: Float[Tensor, "k r"]
    shortfall: float
    residual: float


def _lapack(tall: Float[Tensor, "m k"], norm: float, rule: RankRule, shape: tuple[int, int]) -> _Triplets:
    """The full SVD; if LAPACK does not converge, the same in float64, and then by the Gram matrix in float64."""
    for work in (tall, tall.double()):
        with contextlib.suppress(torch.linalg.LinAlgError):
            u, s, vh = torch.linalg.svd(work, full_matrices=False)
            s = s / norm
            r = _ask(rule, s**2, norm, shape)
            u, s, v = (x.to(tall.dtype) for x in (u[:, :r], s[:r], vh[:r].mT))
            return _Triplets(u, s, v, 0.0, _residual(tall, norm, u, s, v))
    found = _gram(tall.double(), norm, rule, shape)
    return _Triplets(*(x.to(tall.dtype) for x in found[:3]), *found[3:])


def _gram(tall: Float[Tensor, "m k"], norm: float, rule: RankRule, shape: tuple[int, int]) -> _Triplets:
    """Rayleigh-Ritz on the whole space: the eigenvectors of the Gram matrix. Nothing is left to miss."""
    t = (tall.mT / norm) @ (tall / norm) if tall.dtype == torch.float64 else (tall.mT @ tall) / norm**2
    theta, y = torch.linalg.eigh(t)
    v = y.flip(1)[:, : _ask(rule, theta.flip(0), norm, shape)]
    u, s, v = _rotate(tall @ (v / norm), v)
    return _Triplets(u, s, v, 0.0, _residual(tall, norm, u, s, v))


def _krylov(
    tall: Float[Tensor, "m k"],
    norm: float,
    rule: RankRule,
    shape: tuple[int, int],
    tolerance: float,
    seed: int,
    block: int,
    max_steps: int = 10**6,
) -> _Triplets:
    """Block Krylov until the certificate holds. `max_steps` is for tests, which must see a weaker setting fail."""
    k = tall.shape[1]
    generator = torch.Generator().manual_seed(seed)

    def noise(columns: int) -> Tensor:
        return torch.randn(k, columns, generator=generator, dtype=tall.dtype).to(tall.device)

    eps = torch.finfo(tall.dtype).eps
    q = torch.linalg.qr(noise(block)).Q
    basis, t = q, q.new_zeros(0, 0)
    images = []
    previous = 0
    for step in range(1, max_steps + 1):
        images.append(tall @ (q / norm))
        z = tall.mT @ (images[-1] / norm)
        h = basis.mT @ z
        t = _bordered(t, h)
        z_rest = z - basis @ h
        # Directions that died out (an invariant subspace was found) come back as fresh random ones: at the level of
        # rounding, noise changes nothing else.
        fresh = max(block - z.shape[1], 0)
        z_rest = torch.cat([z_rest + noise(z.shape[1]) * (eps / math.sqrt(k)), noise(fresh)], dim=1)
        following = torch.linalg.qr(z_rest).Q
        following = torch.linalg.qr(following - basis @ (basis.mT @ following)).Q
        left = max(1.0 - float(t.trace()), 0.0)
        if step == max_steps or step > 3 or left < tolerance:
            theta, y = torch.linalg.eigh(t)
            theta, y = theta.flip(0), y.flip(1)
            r = _ask(rule, theta, norm, shape)
            if r <= len(theta):
                s_j = following.mT @ z
                short = _certificate(t, s_j, theta, r, left, trailing=previous + z.shape[1])
                if _SAFETY * short <= tolerance or step == max_steps:
                    y = y[:, :r]
                    u, s, v = _rotate(sum(w @ part for w, part in zip(images, y.split([w.shape[1] for w in images]))), basis @ y)
                    coupling = torch.linalg.vector_norm(s_j @ y[-z.shape[1] :], dim=0) / theta[:r].clamp(min=eps**2).sqrt()
                    return _Triplets(u, s, v, _SAFETY * short, float(coupling.max() / s[0]))
            block = max(block, min(_block(r), 2 * block))
        if basis.shape[1] + following.shape[1] > _FULL * k:
            return _gram(tall, norm, rule, shape)
        previous = z.shape[1]
        q = following
        basis = torch.cat([basis, q], dim=1)
    raise AssertionError("unreachable")
