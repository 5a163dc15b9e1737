r"""The noise that a checkpoint's own type puts on a delta, and the largest singular value that noise alone would have.

Rounding to a type of spacing $q$ puts noise of variance $q^2 / 12$ on a value. $q$ follows the value's exponent, so
the variance differs between entries. Of noise of variances $r_i c_j / T$ (sums of rows times those of columns, over the
sum of all) the largest singular value tends to $\sqrt z$ with

$$z = \min_{a, b > 0} \frac{\varphi(b)}{a}, \quad a\,\psi(a) = b\,\varphi(b), \quad
  \varphi(b) = \frac1T \sum_j \frac{c_j}{1 - c_j b}, \quad \psi(a) = \frac1T \sum_i \frac{r_i}{1 - r_i a},$$

the edge of the separable Marchenko-Pastur law (Paul and Silverstein, 2009); with equal variances $\sigma^2$ it is the
well known $\sigma^2 (\sqrt m + \sqrt n)^2$.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from peft_posthoc.linalg.norms import chunk, energy_of

if TYPE_CHECKING:
    from jaxtyping import Float

_COARSE = (torch.bfloat16, torch.float16)
# Quantile 0.999 of the law of the largest eigenvalue's fluctuations (Tracy and Widom, 1996, real matrices).
_TRACY_WIDOM = 3.27


class Noise(NamedTuple):
    """What is known of the noise on one delta."""

    energy: float
    """`||noise||_F^2` as expected, and at most: a delta may have been rounded once or twice."""
    edge: float
    """The largest singular value of such noise of energy 1."""


def rounding(
    base: Float[Tensor, "*shape"],
    tuned: Float[Tensor, "*shape"],
    delta: Float[Tensor, "*shape"],
    steps: tuple[Float[Tensor, "*shape"] | None, Float[Tensor, "*shape"] | None] = (None, None),
) -> Noise | None:
    """The noise that saving in bfloat16 or float16, or quantising, put on `delta = tuned - base`.

    None where neither is known to have put any: `tuned` has another type, and no grid is given.

    Both checkpoints count if both are rounded. That is too much where the fine-tune started from the rounded base, and
    where changes are so small that most are rounded away; so no row or column has more than it holds at all.

    Args:
        base: The weight before, as saved.
        tuned: The weight after, as saved.
        delta: Their difference, in float32 or float64.
        steps: Of each, where it is quantised, the grid's step at every value: it takes the place of the type's.
    """
    before, after = steps
    if (tuned.dtype not in _COARSE and before is None and after is None) or delta.ndim != 2:
        return None
    m, n = delta.shape
    rows, columns = (torch.zeros(2, side, dtype=torch.float64, device=delta.device) for side in (m, n))
    height = max(1, chunk(delta.device) // n)  # What is made of so many rows stays in the cache.
    for start in range(0, m, height):
        part = slice(start, start + height)
        variance = torch.zeros(delta[part].shape, device=delta.device)
        for saved, step in ((base, before), (tuned, after)):
            if step is not None:
                variance += step[part].float().square()
            elif saved.dtype in _COARSE:
                variance += _spacing(saved[part]).square_()
        for i, squares in enumerate((variance, delta[part].float().square())):
            rows[i, part] = squares.sum(1).double()
            columns[i] += squares.sum(0).double()
    rows, columns = rows.cpu(), columns.cpu()
    rows[0] /= 12
    columns[0] /= 12
    r, c = rows.amin(0), columns.amin(0)
    energy = float(min(r.sum(), c.sum()))
    if not energy:
        return None
    return Noise(energy, edge(r, c))


def _spacing(x: Tensor) -> Tensor:
    """The distance to the next value of the type of `x`, in float32."""
    kind = torch.finfo(x.dtype)
    # The exponent alone, as a float: a power of two at most `|x|`.
    power = (x.float().view(torch.int32) & 0x7F800000).view(torch.float32)
    return power.clamp_(min=kind.smallest_normal).mul_(kind.eps)


def error_of(steps: Float[Tensor, "*shape"]) -> float:
    """`||error||_F^2` that rounding to a grid of these steps is expected to make."""
    return energy_of(steps) / 12


def white(m: int, n: int) -> float:
    """The largest singular value of m x n white noise of energy 1, but for one case in a thousand (Johnstone, 2001)."""
    wide = math.sqrt(m) + math.sqrt(n)
    scale = wide * (1 / math.sqrt(m) + 1 / math.sqrt(n)) ** (1 / 3)
    return math.sqrt((wide**2 + _TRACY_WIDOM * scale) / (m * n))


def edge(rows: Float[Tensor, " m"], columns: Float[Tensor, " n"]) -> float:
    """The largest singular value of noise of energy 1, but for one case in a thousand.

    Args:
        rows: What the variances of each row sum up to, but for a factor.
        columns: The same of each column.
    """
    r, c = (x[x > 0].double() / x.sum() for x in (rows, columns))
    low, high = -30.0, 30.0  # of log(a psi(a)), which is log(b phi(b))
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        first, second = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, second) if _squared(r, c, first) < _squared(r, c, second) else (first, high)
    m, n = len(r), len(c)
    plain = math.sqrt((math.sqrt(m) + math.sqrt(n)) ** 2 / (m * n))
    return math.sqrt(_squared(r, c, (low + high) / 2)) * white(m, n) / plain


def _squared(r: Float[Tensor, " m"], c: Float[Tensor, " n"], level: float) -> float:
    """`z` where `a psi(a) = b phi(b) = exp(level)`."""
    level = math.exp(level)
    return level / (_solve(r, level) * _solve(c, level))


def _solve(x: Float[Tensor, " k"], level: float) -> float:
    """`a` below `1 / max(x)` with `sum(x a / (1 - x a)) = level`: Newton's method, kept between bounds."""
    top = float(x[x.argmax()])
    low, high = 0.0, 1 / top
    # One term alone reaches the level no later than all do.
    high = min(high, level / (top * (1 + level)))
    a = high
    for _ in range(100):
        rest = 1 - x * a
        value = float((x * a / rest).sum()) - level
        if abs(value) <= 1e-12 * level:
            break
        low, high = (a, high) if value < 0 else (low, a)
        newton = a - value / float((x / rest**2).sum())
        a = newton if low < newton < high else (low + high) / 2
    return a
