"""One module of an adapter file: its rank, its scale, and the matrices that its two tensors are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from peft_posthoc.adapters.factors import Factors
from peft_posthoc.adapters.names import PREFIX
from peft_posthoc.adapters.tensors import Factored

Kind = Literal["linear", "embedding", "convolution", "experts"]


@dataclass(frozen=True)
class Module:
    """One module of an adapter file that has factors."""

    name: str
    """PEFT's, without the prefix."""
    kind: Kind
    rank: int
    scale: float
    """The number that PEFT multiplies the product with."""
    filed: Factored
    """Names and shapes of its tensors."""
    experts: int = 1
    """How many deltas are stacked in it."""
    bias: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """`m` and `n` of each delta; of a convolution, `n` counts the kernel too."""
        return self.filed.size

    def tensor_names(self) -> tuple[str, str]:
        """Names of its factors in the file."""
        return self.filed.a_name, self.filed.b_name

    @property
    def bias_name(self) -> str:
        """Name in the file of what is added to its bias."""
        return f"{PREFIX}{self.name}.lora_B.bias"

    def split(self, a: Tensor, b: Tensor) -> list[Factors]:
        """The matrices of each delta, out of the file's tensors: views."""
        if self.kind != "experts":
            return [Factors(*self.filed.kind.factors(a, b))]
        # PEFT's `ParamWrapper`: rows of A by expert and then rank, columns of B by rank and then expert.
        stacked = b.reshape(len(b), -1, self.experts)
        each = a.reshape(self.experts, -1, a.shape[1])
        return [Factors(each[e], stacked[:, :, e]) for e in range(self.experts)]

    def join(self, parts: list[Factors]) -> dict[str, Tensor]:
        """The file's tensors, out of the matrices of each delta, all of one rank."""
        a_key, b_key = self.tensor_names()
        if self.kind == "experts":
            a, b = torch.cat([one.a for one in parts]), torch.stack([one.b for one in parts], dim=-1).flatten(1)
        else:
            ((a, b),) = parts
        kernel = self.filed.a_shape[2:]
        return {
            a_key: a.reshape(len(a), *self.filed.a_shape[1:]).contiguous(),
            b_key: b.reshape(*b.shape, *(1 for _ in kernel)).contiguous(),
        }
