"""Energy against rank, per layer and in total (PHLoRA, Figure 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_posthoc.extraction.adapter import Adapter

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Curves:
    """E_r (PHLoRA, eq. 5) for every rank up to the one that was factored."""

    layers: Mapping[str, Float[Tensor, " ranks"]]
    """By weight name: the share of that delta's energy that the best rank 1, 2, ... keeps. A small layer's curve is
    shorter than others."""
    total: Float[Tensor, " ranks"]
    """Energy by rank over all layers together, weighted by energy."""
    bytes_per_rank: int
    """Bytes of one rank more in the adapter file."""

    @classmethod
    def of(cls, adapter: Adapter) -> Curves:
        """The curves of every layer of an adapter, up to the adapter's rank."""
        held = {name: torch.cumsum(layer.factors.s**2, 0) for name, layer in adapter.layers.items()}
        energies = {name: layer.factors.norm**2 for name, layer in adapter.layers.items()}
        ranks = max(len(curve) for curve in held.values())
        # Beyond its own rank a layer holds what it holds.
        padded = [torch.cat([curve, curve[-1:].expand(ranks - len(curve))]) for curve in held.values()]
        return cls(
            layers={name: (curve / energies[name]).clamp(max=1) for name, curve in held.items()},
            total=(torch.stack(padded).sum(0) / sum(energies.values())).clamp(max=1),
            bytes_per_rank=sum(adapter.file.bytes_by_module.values()) // adapter.file.rank,
        )

    def at(self, weight: str, rank: int) -> float:
        """E_r of one layer. Beyond its own rank a layer holds what it holds."""
        curve = self.layers[weight]
        return float(curve[min(rank, len(curve)) - 1])

    def ranks(self) -> list[int]:
        """The ranks worth a column: powers of two, and the largest."""
        top = len(self.total)
        return sorted({2**i for i in range(top.bit_length()) if 2**i <= top} | {top})

    def to_dict(self) -> dict[str, Any]:
        """The curves as plain JSON values; the i-th number of a list belongs to rank i + 1."""
        return {
            "format": 1,
            "bytes_per_rank": self.bytes_per_rank,
            "total": self.total.tolist(),
            "layers": {name: curve.tolist() for name, curve in self.layers.items()},
        }
