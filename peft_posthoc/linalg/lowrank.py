"""The leading triplets of a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


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

    @property
    def shape(self) -> tuple[int, int]:
        """`m` and `n`."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def triplets(self) -> Triplets:
        """The same without the factors."""
        return Triplets(self.shape, self.s, self.energy, self.norm, self.shortfall, self.residual)

    def cut(self, rank: int) -> LowRank:
        """The factors of a smaller rank: the `rank` leading triplets.

        Raises:
            ValueError: `rank` lies outside of 1 to the rank held.
        """
        cut = self.triplets.cut(rank)
        return LowRank(self.a[:rank], self.b[:, :rank], cut.s, cut.energy, cut.norm, cut.shortfall, cut.residual)


class Triplets(NamedTuple):
    """The leading singular values of one weight delta, and how good they are: `LowRank` without factors."""

    shape: tuple[int, int]
    """`m` and `n`."""
    s: Float[Tensor, " r"]
    energy: float
    norm: float
    shortfall: float
    residual: Float[Tensor, " r"]

    def cut(self, rank: int) -> Triplets:
        """The `rank` leading ones.

        Raises:
            ValueError: `rank` lies outside of 1 to the rank held.
        """
        held = len(self.s)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= held:
            raise ValueError(f"`LowRank.cut(rank=...)` must lie between 1 and {held}, the rank held. Got {rank!r}.")
        energy = share(self.s[:rank], self.norm)
        # Every Ritz value lies below its singular value: some of them together miss no more energy than all.
        shortfall = self.shortfall * self.energy / energy if energy else 0.0
        return Triplets(self.shape, self.s[:rank], energy, self.norm, shortfall, self.residual[:rank])


def share(s: Float[Tensor, " r"], norm: float) -> float:
    """The share of the energy `norm**2` that singular values hold."""
    return min(float(((s / norm) ** 2).sum()), 1.0) if norm else 0.0
