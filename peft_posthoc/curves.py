"""Energy against rank, per layer and in total (PHLoRA, Figure 1): as numbers, a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from peft_posthoc.errors import MissingExtraError
from peft_posthoc.portable import safe_rank
from peft_posthoc.report import shorten, size

if TYPE_CHECKING:
    from peft_posthoc.adapter import Adapter


@dataclass(frozen=True)
class Curves:
    """E_r (PHLoRA, eq. 5) for every rank up to the one that was factored."""

    layers: Mapping[str, Float[Tensor, " ranks"]]
    """By weight name: the share of that delta's energy that the best rank 1, 2, ... keeps. A small layer's curve is
    shorter than others."""
    total: Float[Tensor, " ranks"]
    """The same over all layers together, weighted by energy."""
    bytes_per_rank: int
    """What one rank more costs in the adapter file."""

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
            bytes_per_rank=sum(adapter.form.bytes(adapter).values()) // adapter.form.rank(adapter),
        )

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

    def table(self) -> str:
        """A row for every layer, a column for every power of two."""
        ranks = self.ranks()[-9:]
        lines = [f"{'E_r at rank':<52} " + " ".join(f"{rank:>8}" for rank in ranks)]
        for name, curve in [*self.layers.items(), ("total", self.total)]:
            cells = (f"{100 * float(curve[min(rank, len(curve)) - 1]):>7.1f}%" for rank in ranks)
            lines.append(f"{shorten(name):<52} " + " ".join(cells))
        sizes = (f"{size(self.bytes_per_rank * safe_rank(rank)):>8}" for rank in ranks)
        lines.append(f"{'size of the adapter':<52} " + " ".join(sizes))
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw energy against rank, as in Figure 1 of the paper, into a PNG (or any format matplotlib knows).

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError("Plots need matplotlib: `pip install 'peft-posthoc[plot]'`.") from error
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        kinds = sorted({_leaf(name) for name in self.layers})
        for name, curve in self.layers.items():
            color = f"C{kinds.index(_leaf(name)) % 10}"
            axes.plot(range(1, len(curve) + 1), curve.tolist(), color=color, alpha=0.35, linewidth=0.8)
        for kind in kinds:
            axes.plot([], [], color=f"C{kinds.index(kind) % 10}", label=kind)
        axes.plot(range(1, len(self.total) + 1), self.total.tolist(), color="black", linewidth=2.5, label="total")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set(xlabel="rank", ylabel="energy kept, $E_r$", ylim=(0, 1.02), title="Preserved energy against rank")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", ncols=2)
        figure.savefig(path, dpi=150)


def _leaf(weight: str) -> str:
    return weight.removesuffix(".weight").rpartition(".")[2]
