"""The two factors of one matrix, and a weight with their product added."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from peft_posthoc.compute.precision import full_precision
from peft_posthoc.models.kinds import LayerKind


class Factors(NamedTuple):
    """The factors of one matrix, any scale folded into `b`."""

    a: Float[Tensor, "r n"]
    b: Float[Tensor, "m r"]

    def padded(self, rank: int) -> Factors:
        """New factors with rows and columns of zeros behind their own."""
        a, b = self.a.new_zeros(rank, self.a.shape[1]), self.b.new_zeros(len(self.b), rank)
        a[: len(self.a)] = self.a
        b[:, : len(self.a)] = self.b
        return Factors(a, b)

    def to(self, like: Tensor | torch.dtype | torch.device) -> Factors:
        """The same on another device, or of another type."""
        return Factors(self.a.to(like), self.b.to(like))

    def product(self) -> Float[Tensor, "m n"]:
        """`b @ a`."""
        with full_precision(), torch.no_grad():
            return self.b @ self.a

    def added(self, base: Tensor, kind: LayerKind) -> Tensor:
        """`base + b @ a` as the weight is stored, in float32, or float64 where one of them is."""
        product = kind.weight(self.to(base.device).product(), tuple(base.shape))
        return base.to(torch.promote_types(torch.promote_types(torch.float32, base.dtype), product.dtype)) + product
