"""The two factors of a module, and a weight with them added."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from peft_posthoc.compute.precision import full_precision
from peft_posthoc.linalg.lowrank import LowRank
from peft_posthoc.models.kinds import LayerKind


def merged(base: Tensor, factors: LowRank | Factors, kind: LayerKind) -> Tensor:
    """`base + b @ a` as the weight is stored, in float32, or float64 where one of them is."""
    with full_precision(), torch.no_grad():
        product = kind.weight(factors.b.to(base.device) @ factors.a.to(base.device), tuple(base.shape))
    return base.to(torch.promote_types(torch.promote_types(torch.float32, base.dtype), product.dtype)) + product


class Factors(NamedTuple):
    """What an adapter folder holds for one module, its scale folded into `b`."""

    a: Float[Tensor, "r n"]
    b: Float[Tensor, "m r"]
