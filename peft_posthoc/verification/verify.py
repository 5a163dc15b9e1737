"""Is base + adapter the tuned model? The weights first, one at a time, then what the models say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from peft_posthoc.adapters.factors import Factors
from peft_posthoc.adapters.names import own_name
from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.adapters.reader import LoraFolder
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.compute.device import pick_device
from peft_posthoc.errors import AdapterError
from peft_posthoc.extraction.delta import Pair, difference
from peft_posthoc.extraction.extract import read_pairs
from peft_posthoc.extraction.plan import Plan, everything, make_plan
from peft_posthoc.linalg.norms import frobenius
from peft_posthoc.models.layout import Place, is_of_an_expert
from peft_posthoc.pairing.difference import Difference
from peft_posthoc.pairing.differences import differences, told_as_notes, told_as_warnings
from peft_posthoc.pairing.experts import Experts
from peft_posthoc.pairing.pair import match
from peft_posthoc.sources import Source, open_pair
from peft_posthoc.text import asked, shorten
from peft_posthoc.verification.outputs import Outputs, compare_outputs

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


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    rows: tuple[WeightRow, ...]
    cosine: float
    """Of the adapter with the whole fine-tune's delta, what is left out included."""
    energy: float
    """Share of the whole delta's energy that the adapter, as saved, explains."""
    worst: str
    """The carried weight with the lowest `delta_cosine`."""
    adapter: Outputs | None
    """Base + adapter against tuned; None if outputs were not compared."""
    base: Outputs | None
    """Base alone against tuned: what the adapter's numbers are to be held against."""
    outputs_note: str
    """What was compared, or why nothing was."""
    differences: tuple[Difference, ...] = ()
    """Of configuration and tokenizer: base + adapter keeps the base's."""

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain JSON values."""
        return {"format": 1, **asdict(self)}

    def table(self) -> str:
        """The findings for a terminal."""
        lines = [f"{'weight':<52} {'cos(ba,d)':>10} {'err(ba,d)':>10} {'cos(w,tuned)':>13} {'err(w,tuned)':>13}"]
        lines += [
            f"{shorten(row.weight):<52} {_number(row.delta_cosine):>10} {_number(row.delta_relative_error):>10} "
            f"{_number(row.cosine, 6):>13} {_number(row.relative_error, 6):>13}"
            for row in self.rows
            if row.delta_cosine
        ]
        warnings = (f"Warning: {warning}" for warning in told_as_warnings(self.differences))
        return "\n".join([*lines, "", *self.summary(), *told_as_notes(self.differences), *warnings])

    def summary(self) -> list[str]:
        """The totals, a line each."""
        lines = [
            f"Weights: the adapter has cosine {self.cosine:.4f} with the whole delta and explains {self.energy:.1%} "
            f"of its energy; of what it carries, `{self.worst}` comes out worst."
        ]
        if self.adapter is None or self.base is None:
            return [*lines, f"Outputs not compared: {self.outputs_note}."]
        for name, outputs in (("base", self.base), ("base + adapter", self.adapter)):
            said = "" if outputs.kl is None else f"KL {outputs.kl:.5f} nats, top-1 agreement {outputs.top1:.1%}, "
            lines.append(f"{name + ' against tuned:':<29} {said}relative error {outputs.relative_error:.4f}")
        return [*lines, f"({self.outputs_note})"]


def verify(
    adapter: str | PathLike[str],
    base: Source,
    tuned: Source,
    *,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    prompts: Sequence[str] = (),
    token_ids: Sequence[Sequence[int]] = (),
    outputs: bool = True,
    rename: str | Iterable[str] = (),
    serve_as: str | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> Verification:
    """Compare base + adapter with the tuned model.

    Args:
        adapter: A PEFT LoRA folder.
        base: The model before, as in `extract`.
        tuned: The model after.
        base_revision: Branch, tag or commit, where `base` is a hub id.
        tuned_revision: The same for `tuned`.
        prompts: Texts to compare the models' outputs on; needs a tokenizer beside the model.
        token_ids: The same, already tokenized. Without either, a few built-in texts, or random tokens.
        outputs: Compare outputs too, not only weights. It loads the models with transformers, one after the other.
        rename: As in `extract`.
        serve_as: As in `extract`.
        device: Where to compute.
        progress: Show progress bars on stderr.

    Raises:
        AdapterError: The folder is no LoRA adapter, or does not fit the base.
        CheckpointError: A checkpoint cannot be read.
        MismatchError: Base and tuned are not states of one model.
    """
    where = pick_device(device)
    opened = open_pair(base, tuned, base_revision=base_revision, tuned_revision=tuned_revision)
    beside = differences(*opened)
    folder = LoraFolder(adapter)
    found = match(
        *opened,
        rules=[rename] if isinstance(rename, str) else list(rename),
        serve_as=serve_as,
        experts=experts_in(folder),
        vocab="extend" if _extends(folder, opened[0]) else "truncate",
        of_tuned=bool(folder.whole),
    )
    before, after = found.base, found.tuned
    plan = make_plan(before, after, choose=everything, layout=found.layout, whole=found.resized)
    stored = AdapterOnModel(folder, before, found.layout)
    _fits(stored, plan)
    weights = _compare_weights(before, after, stored, plan, where, progress=progress)
    delta = sum(weight.delta**2 for weight in weights)
    product = sum(weight.product**2 for weight in weights)
    residual = sum(weight.residual**2 for weight in weights)
    inner = sum(weight.inner for weight in weights)
    carried = [weight.row for weight in weights if weight.row.delta_cosine is not None and weight.product > 0]
    adapted, alone, note = None, None, "not asked for"
    if serve_as is not None:
        note = f"with {asked('serve_as', None)} only weights are compared"
    elif outputs:
        adapted, alone, note = compare_outputs(
            before, after, adapter, prompts, token_ids, where, extended=bool(found.resized), progress=progress
        )
    return Verification(
        rows=tuple(weight.row for weight in weights),
        cosine=inner / math.sqrt(delta * product) if delta and product else 0.0,
        energy=1 - residual / delta if delta else 1.0,
        worst=min(carried, key=lambda row: row.delta_cosine or 0.0).weight if carried else "",
        adapter=adapted,
        base=alone,
        outputs_note=note,
        differences=beside,
    )


class _Weight(NamedTuple):
    row: WeightRow
    delta: float
    product: float
    residual: float
    inner: float


def _extends(folder: LoraFolder, base: Checkpoint) -> bool:
    """Whether it holds tensors whole that have other rows than the base's: embeddings of another vocabulary."""
    return any(
        own in base.headers
        and base.headers[own].shape[1:] == folder.headers[name].shape[1:]
        and base.headers[own].shape != folder.headers[name].shape
        for name in folder.whole
        if folder.headers[name].shape and (own := own_name(name))
    )


def _fits(stored: AdapterOnModel, plan: Plan) -> None:
    """See that what is held whole has the shapes of the model.

    Raises:
        AdapterError: It has not.
    """
    shapes = {own: header.shape for name, header in plan.headers.items() for own in plan.layout.names_of(name)}
    for name, key in stored.replaced.items():
        shape = stored.folder.headers[key].shape
        if shapes.get(name) != shape:
            there = f"in the base it is {list(shapes[name])}" if name in shapes else "the base does not have it"
            raise AdapterError(f"`{stored.folder.label}` holds `{name}` whole, as {list(shape)}; {there}.")


def _compare_weights(
    base: Checkpoint,
    tuned: Checkpoint,
    stored: AdapterOnModel,
    plan: Plan,
    device: torch.device,
    *,
    progress: bool,
) -> list[_Weight]:
    compared = []
    new_heads = {name for name in plan.headers if set(plan.layout.names_of(name)) & stored.replaced.keys()}
    with read_pairs(base, tuned, plan.headers) as pairs:
        for pair in tqdm(pairs, total=len(plan.headers), desc="Weights", disable=not progress):
            if pair.base is None and pair.tuned is not None and pair.name in new_heads:
                pair = pair._replace(base=torch.zeros_like(pair.tuned))
            if pair.base is None or pair.tuned is None or pair.base.shape != pair.tuned.shape:
                continue
            if not pair.base.dtype.is_floating_point:
                continue  # a counter
            places = [place for place in plan.layout.places(pair.name) if stored.rank_of(place.module)]
            change = _unfactored(pair, stored, plan)
            factors = stored.factors(places[0].module) if places else None
            compared.append(_compare(pair, factors, change, places, device))
    return compared


def _unfactored(pair: Pair, stored: AdapterOnModel, plan: Plan) -> Tensor | None:
    """What the adapter adds to a tensor beside factors; None if nothing."""
    names = plan.layout.names_of(pair.name)
    whole = next((stored.replaced[name] for name in names if name in stored.replaced), None)
    if whole is not None:
        return difference(pair._replace(tuned=stored.folder.tensor(whole))).values
    module, _, leaf = names[0].rpartition(".")
    return stored.bias(module) if leaf == "bias" and module in stored.biases else None


def _compare(
    pair: Pair, factors: Factors | None, added: Tensor | None, places: Sequence[Place], device: torch.device
) -> _Weight:
    if pair.base is None or pair.tuned is None:
        raise ValueError("`_compare(pair=...)` needs both weights.")
    delta = difference(pair, device=device)
    # All that is asked for is the same for a weight and for its matrix; by blocks of rows, no other copy is as large.
    as_matrix = places[0].kind.matrix if factors is not None else torch.atleast_1d
    direct = None if added is None else as_matrix(added.to(delta.values))
    rows = max(1, _BLOCK // max(1, delta.values[0].numel() if delta.values.ndim else 1))
    blocks = zip(*(torch.split(as_matrix(x), rows) for x in (delta.values, pair.base, pair.tuned)), strict=True)
    sums = torch.zeros(6, dtype=torch.float64)
    for index, (change, base, tuned) in enumerate(blocks):
        start = index * rows
        product = torch.zeros_like(change)
        if factors is not None:
            product = factors.b[start : start + rows].to(change) @ factors.a.to(change)
        if direct is not None:
            product = product + direct[start : start + rows]
        after = tuned.to(change)
        merged = base.to(change) + product
        sums += torch.tensor(
            [
                *(frobenius(x) ** 2 for x in (product, change - product, after, merged)),
                _inner(product, change),
                _inner(merged, after),
            ],
            dtype=torch.float64,
        )
    product_energy, residual, after_energy, merged_energy, inner, merged_inner = sums.tolist()
    row = WeightRow(
        weight=pair.name,
        relative_error=math.sqrt(residual / after_energy) if after_energy else None,
        cosine=merged_inner / math.sqrt(merged_energy * after_energy) if merged_energy * after_energy else None,
        delta_relative_error=math.sqrt(residual) / delta.norm if delta.norm else None,
        delta_cosine=_over(inner, delta.norm * math.sqrt(product_energy)) if delta.norm else None,
    )
    return _Weight(row, delta.norm, math.sqrt(product_energy), math.sqrt(residual), inner)


def _over(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _inner(x: Tensor, y: Tensor) -> float:
    """The sum of products, in float64."""
    return float(torch.dot(x.reshape(-1).double(), y.reshape(-1).double()))


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def experts_in(folder: LoraFolder) -> Experts:
    """How an adapter holds experts."""
    if any(module.kind == "experts" for module in folder.modules.values()):
        return "fused"
    return "per-expert" if any(map(is_of_an_expert, folder.modules)) else "none"
