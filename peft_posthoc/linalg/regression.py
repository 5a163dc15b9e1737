"""Reduced-rank regression: the matrix of a rank that says best of all what some outputs were, given their inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_posthoc.linalg.lowrank import LowRank
from peft_posthoc.linalg.svd import truncated_svd

if TYPE_CHECKING:
    from jaxtyping import Float

# Columns of the right sides that are solved for at a time, in float64.
_COLUMNS = 1024


def damp(gram: Float[Tensor, "n n"], crosses: dict[str, Tensor], deltas: dict[str, Tensor], share: float) -> bool:
    """Draw regressions of several outputs on the same inputs towards matrices that are known, in place.

    Where the inputs say little, the answer is then the known matrix: ridge regression, around it in place of zero.

    Args:
        gram: `x.T @ x`, of the inputs `x`, tokens by `n`.
        crosses: By name, `x.T @ y` of the outputs `y`, tokens by `m`.
        deltas: By the same names, the known matrices, `m` by `n`.
        share: How strongly, relative to the mean square of an input.

    Returns:
        Whether there is anything to go by: inputs that are not all zero, and are numbers.
    """
    strength = share * float(gram.diagonal().mean(dtype=torch.float64))
    if not 0 < strength < float("inf"):
        return False
    gram.diagonal().add_(strength)
    for name, cross in crosses.items():
        cross.add_(deltas[name].mT.to(cross.dtype), alpha=strength)
    return True


@torch.no_grad()
def root_of(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """A lower triangle with `root @ root.T = gram`, in float64.

    Any square root gives the same regression. This one takes a thirtieth of the time of the symmetric one by `eigh`,
    and a third of its memory; that is needed where `gram` may be singular, which one that was damped is not.

    Raises:
        ValueError: `gram` is not positive definite.
    """
    root, failed = torch.linalg.cholesky_ex(gram.double())
    if failed:
        raise ValueError("`root_of(gram=...)` must be positive definite: damp it, and look for NaN in the inputs.")
    found: Tensor = root
    return found


@torch.no_grad()
def regress(root: Float[Tensor, "n n"], cross: Float[Tensor, "n m"], rank: int) -> LowRank:
    r"""Fit `b @ a` of a rank to outputs, given their inputs.

    With $C = X^\top X = L L^\top$ and $G = X^\top Y$, least squares alone would give $M = G^\top C^{-1}$. Of rank $r$,
    $\|X (BA)^\top - Y\|$ is least for the best approximation of $M$ in the metric $C$: the truncated SVD of
    $M L = (L^{-1} G)^\top$, times $L^{-1}$ (A. J. Izenman, Reduced-rank regression for the multivariate linear model,
    1975).

    Args:
        root: `L`, as `root_of` gives it.
        cross: `G`.
        rank: From 1 to `min(m, n)`.

    Returns:
        The factors in the type of `cross`, of equal norms in each pair. Singular values, energy and norm are those in
        the metric.
    """
    image = torch.empty_like(cross)
    for part, out in zip(cross.split(_COLUMNS, dim=1), image.split(_COLUMNS, dim=1), strict=True):
        out.copy_(torch.linalg.solve_triangular(root, part.double(), upper=False))
    found = truncated_svd(image.mT, rank)
    a = torch.linalg.solve_triangular(root.mT, found.a.double().mT, upper=True).mT
    # The metric's size has gone into `a` alone: what is saved in 16 bits, and moved by relative steps, is balanced.
    rows, columns = torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(found.b.double(), dim=0)
    move = torch.where((rows > 0) & (columns > 0), (columns / rows).sqrt(), torch.ones_like(rows))
    return found._replace(a=(a * move[:, None]).to(found.a.dtype), b=(found.b / move).to(found.b.dtype))
