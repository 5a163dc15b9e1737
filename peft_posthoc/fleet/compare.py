r"""How alike adapters of one base are, from their factors alone.

With $\Delta_k = B_k A_k$, inner products are those of small matrices: $\langle\Delta_k, \Delta_l\rangle =
\langle B_k^\top B_l, A_k A_l^\top\rangle$. Exact for the adapters as they were saved; what they leave out of the
fine-tunes has no part in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_posthoc.adapters.factors import Factors
from peft_posthoc.adapters.open import open_adapter
from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.compute.precision import full_precision

if TYPE_CHECKING:
    from jaxtyping import Float

# Directions of all adapters in one module, beyond which the joint factorization would take minutes a module.
_MOST = 4096


@dataclass(frozen=True)
class Comparison:
    """Adapters of one base against one another."""

    names: tuple[str, ...]
    norms: Float[Tensor, " adapters"]
    """Of each adapter's delta, all modules together."""
    cosines: Float[Tensor, "adapters adapters"]
    """Between their deltas, all modules together."""
    rank: int
    """The largest of a module in one adapter."""
    shared: dict[int, float] | None
    """By rank: the mean share of their energy that is left where all have one basis of that rank in each module, the
    best one for them all (one `lora_A`); None where they are too many for it."""

    @classmethod
    def of(cls, folders: dict[str, Path]) -> Comparison:
        """Compare adapters.

        Args:
            folders: By name.

        Raises:
            AdapterError: One cannot be read.
        """
        adapters = [open_adapter(folder) for folder in folders.values()]
        with full_precision(), torch.no_grad():
            gram = sum(
                (_gram(each, len(adapters)) for each in _modules(adapters)),
                torch.zeros(len(adapters), len(adapters), dtype=torch.float64),
            )
            norms = gram.diagonal().sqrt()
            scale = torch.where(norms > 0, 1 / norms, 0)
            shared = _shared(adapters, scale)
            rank = max(len(one.a) for each in _modules(adapters) for _, one in each)
        return cls(tuple(folders), norms, (gram * scale[:, None] * scale).clamp(-1, 1), rank, shared)

    def nearest(self, name: str) -> tuple[str, float] | None:
        """The adapter with the largest cosine to this one, and the cosine; None where it is alone."""
        at = self.names.index(name)
        others = [(float(self.cosines[at, i]), other) for i, other in enumerate(self.names) if i != at]
        return (max(others)[1], max(others)[0]) if others else None

    def shares(self) -> list[tuple[int, float]]:
        """The ranks worth a line: those that all have, and its doubles, with the share that is left."""
        ranks = [self.rank << i for i in range(16)]
        return [(rank, self.shared[rank]) for rank in ranks if rank in (self.shared or {})] if self.shared else []


def _modules(adapters: Sequence[AdapterFile]) -> Iterator[list[tuple[int, Factors]]]:
    """For every matrix: the factors of each adapter that has it, with its place among them."""

    def held(one: Factors) -> Factors:
        own = one.a.any(1)  # The others are padding.
        return Factors(one.a[own], one.b[:, own])

    for module in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        found = [(at, one.factors(module)) for at, one in enumerate(adapters) if module in one.modules]
        for part in range(max(len(factors) for _, factors in found)):
            each = [(at, held(factors[part])) for at, factors in found if part < len(factors)]
            if any(len(one.a) for _, one in each):
                yield each


def _gram(each: Sequence[tuple[int, Factors]], size: int) -> Tensor:
    """The inner products of the deltas of as many adapters; zero where one has none."""
    owners = torch.cat([torch.full((len(one.a),), at) for at, one in each])
    a, b = torch.cat([one.a for _, one in each]), torch.cat([one.b for _, one in each], dim=1)
    of = torch.nn.functional.one_hot(owners, size).double()
    return of.mT @ ((b.mT @ b) * (a @ a.mT)) @ of


def _shared(adapters: Sequence[AdapterFile], scale: Tensor) -> dict[int, float] | None:
    """The mean share of the adapters' energy in the best common basis of the inputs of each module, by its rank.

    It is that of the eigenvectors of the sum of all deltas' `delta.T @ delta`, each adapter at norm one. With the root
    of `b.T @ b` in place of `b` each has a row for each of its directions, and the same product.
    """
    directions = Counter[str]()
    for one in adapters:
        directions.update({name: module.rank for name, module in one.modules.items()})
    if max(directions.values()) > _MOST:
        return None
    kept: dict[int, float] = {}
    energies = []
    for each in _modules(adapters):
        rows = torch.cat([scale[at] * _root(one.b.mT @ one.b) @ one.a for at, one in each])
        gram = rows @ rows.mT if len(rows) < rows.shape[1] else rows.mT @ rows
        energies.append(torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cumsum(0))
    total = sum(float(each[-1]) for each in energies)
    for rank in range(1, max(map(len, energies)) + 1):
        kept[rank] = sum(float(each[min(rank, len(each)) - 1]) for each in energies) / total if total else 1.0
    return kept


def _root(square: Tensor) -> Tensor:
    """The symmetric root of a matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(square)
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    return root
