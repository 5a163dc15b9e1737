"""The two factors of one matrix, and a weight with their product added."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from peft_posthoc.compute.precision import full_precision
from peft_posthoc.models.kinds import LayerKind

if TYPE_CHECKING:
    from jaxtyping import Float


class Factors(NamedTuple):
    """The factors of one matrix, any scale folded into `b`."""

    a: Float[Tensor, "r n"]
    b: Float[Tensor, "m r"]

    def padded(self, rank: int, dtype: torch.dtype | None = None) -> Factors:
        """New factors with rows and columns of zeros behind their own; of another type, if one is given."""
        own = len(self.a)
        a = self.a.new_empty(rank, self.a.shape[1], dtype=dtype)
        b = self.b.new_empty(len(self.b), rank, dtype=dtype)
        a[:own], b[:, :own] = self.a, self.b
        a[own:], b[:, own:] = 0, 0
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
