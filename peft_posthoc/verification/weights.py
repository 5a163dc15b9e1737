"""Weights of base + adapter against the tuned ones, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_posthoc.adapters.factors import Factors
from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import CheckpointError
from peft_posthoc.extraction.delta import Pair, difference
from peft_posthoc.extraction.plan import Plan
from peft_posthoc.extraction.read import read_pairs
from peft_posthoc.extraction.reasons import CODED
from peft_posthoc.linalg.norms import norm_of
from peft_posthoc.models.layout import Place
from peft_posthoc.progress import progress_bar

# Values of a weight compared at a time.
_BLOCK = 1 << 21


@dataclass(frozen=True)
class WeightRow:
    """One weight: how near base + b @ a comes to tuned, and b @ a to the delta."""

    weight: str
    relative_error: float | None
    """`||base + b @ a - tuned|| / ||tuned||`."""
    cosine: float | None
    """Of base + b @ a and tuned."""
    delta_relative_error: float | None
    """`||b @ a - delta|| / ||delta||`; 1 for what the adapter does not carry, None where nothing changed."""
    delta_cosine: float | None
    """Of b @ a and delta; 0 for what the adapter does not carry, None where nothing changed."""


class Sums(NamedTuple):
    """Squared norms and inner products, of one weight or of all."""

    delta: float
    product: float
    """Of what the adapter adds."""
    residual: float
    """Of the delta without that."""
    tuned: float
    merged: float
    inner: float
    """Of the delta and what the adapter adds."""
    merged_inner: float
    """Of tuned and base + adapter."""

    def row(self, name: str) -> WeightRow:
        """The sums of one weight as shares."""
        delta = math.sqrt(self.delta)
        return WeightRow(
            weight=name,
            relative_error=math.sqrt(self.residual / self.tuned) if self.tuned else None,
            cosine=_cosine(self.merged_inner, self.merged, self.tuned),
            delta_relative_error=math.sqrt(self.residual) / delta if delta else None,
            delta_cosine=(_cosine(self.inner, self.delta, self.product) or 0.0) if delta else None,
        )

    @property
    def cosine(self) -> float:
        """Of the delta and what the adapter adds."""
        return _cosine(self.inner, self.delta, self.product) or 0.0

    @property
    def energy(self) -> float:
        """Share of the delta's energy that the adapter explains."""
        return 1 - self.residual / self.delta if self.delta else float(not self.residual)


def comparable(base: Checkpoint, tuned: Checkpoint, stored: AdapterOnModel, plan: Plan) -> list[str]:
    """The tensors that both checkpoints have in one shape, or the adapter whole: counters and codes are none.

    Raises:
        CheckpointError: The adapter changes a tensor that is quantised.
    """
    found = []
    for name in plan.headers:
        left_out = plan.left_out.get(name)
        if left_out is not None and left_out.reason in CODED:
            if any(stored.rank_of(place.module) for place in plan.layout.places(name)):
                raise CheckpointError(f"`{name}`, which the adapter changes, is {left_out.text}.")
            continue
        before, after = base.headers.get(name), tuned.headers.get(name)
        if before is None and after is not None and _whole(name, stored, plan):
            before = after
        if before and after and before.shape == after.shape and before.dtype.is_floating_point:
            found.append(name)
    return found


def compare_weights(
    base: Checkpoint,
    tuned: Checkpoint,
    stored: AdapterOnModel,
    plan: Plan,
    names: Sequence[str],
    device: torch.device,
    *,
    progress: bool,
) -> dict[str, Sums]:
    """The sums of each of these tensors.

    Raises:
        CheckpointError: A tensor cannot be read, or is not finite.
    """
    found = {}
    with read_pairs(base, tuned, names) as pairs:
        for pair in progress_bar(pairs, total=len(names), desc="Weights", progress=progress):
            if pair.base is None and pair.tuned is not None:
                pair = pair._replace(base=torch.zeros_like(pair.tuned))
            places = [place for place in plan.layout.places(pair.name) if stored.rank_of(place.module)]
            factors = stored.factors(places[0].module) if places else None
            found[pair.name] = _compare(pair, factors, _unfactored(pair, stored, plan), places, device)
    return found


def _whole(name: str, stored: AdapterOnModel, plan: Plan) -> str | None:
    """The file's name of what takes the tensor's place; None if nothing does."""
    return next((stored.replaced[own] for own in plan.layout.names_of(name) if own in stored.replaced), None)


def _unfactored(pair: Pair, stored: AdapterOnModel, plan: Plan) -> Tensor | None:
    """Whatever the adapter adds to a tensor beside factors; None if nothing."""
    if whole := _whole(pair.name, stored, plan):
        return difference(pair._replace(tuned=stored.folder.tensor(whole)).on(torch.device("cpu"))).values
    module, _, leaf = plan.layout.names_of(pair.name)[0].rpartition(".")
    return stored.bias(module) if leaf == "bias" and module in stored.biases else None


def _compare(
    pair: Pair, factors: Factors | None, added: Tensor | None, places: Sequence[Place], device: torch.device
) -> Sums:
    pair = pair.on(device)
    if pair.base is None or pair.tuned is None:
        raise ValueError("`_compare(pair=...)` needs both weights.")
    delta = difference(pair)
    # All that is asked for is the same for a weight and for its matrix; by blocks of rows, no other copy is as large.
    as_matrix = places[0].kind.matrix if factors is not None else torch.atleast_1d
    direct = None if added is None else as_matrix(added.to(delta.values))
    factors = None if factors is None else factors.to(delta.values)
    rows = max(1, _BLOCK // max(1, delta.values[0].numel() if delta.values.ndim else 1))
    sums = torch.zeros(7, dtype=torch.float64, device=delta.values.device)
    for start, (change, base, tuned) in enumerate(
        zip(*(torch.split(as_matrix(x), rows) for x in (delta.values, pair.base, pair.tuned)), strict=True)
    ):
        block = slice(start * rows, (start + 1) * rows)
        product = torch.zeros_like(change) if factors is None else Factors(factors.a, factors.b[block]).product()
        if direct is not None:
            product += direct[block]
        after, merged = tuned.to(change), base.to(change) + product
        # The delta's again, to the same bits as what is left of it where nothing is added.
        squares = [norm_of(x).square() for x in (change, product, change - product, after, merged)]
        sums += torch.stack([*squares, _inner(product, change), _inner(merged, after)])
    return Sums(*sums.cpu().tolist())


def _cosine(inner: float, one: float, other: float) -> float | None:
    """The cosine of two vectors by their squared norms; None where one is zero."""
    return inner / math.sqrt(one) / math.sqrt(other) if one and other else None


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """The sum of products, in float64."""
    return torch.dot(x.reshape(-1).double(), y.reshape(-1).double())
