"""Adapters to smaller adapters: the best of a lower rank, from the factors alone; and the sum of several as one."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, TypeVar

import torch

from peft_posthoc.adapters.cast import cast
from peft_posthoc.adapters.open import open_adapter
from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.compute.workers import Workers
from peft_posthoc.errors import AdapterError, NothingToCarryError
from peft_posthoc.linalg.product import Product, factor_product
from peft_posthoc.linalg.spectrum import RankRule, Spectrum
from peft_posthoc.progress import progress_bar
from peft_posthoc.ranks.budget import budget
from peft_posthoc.ranks.rules import Rank, as_rule, describe, each
from peft_posthoc.resizing.resized import Cut, Resized
from peft_posthoc.resizing.sum import LoraSum
from peft_posthoc.text import asked

T = TypeVar("T")
Folder = str | os.PathLike[str]
Form = Literal["portable", "peft"]


@dataclass(frozen=True)
class keep_all:
    """Keep every triplet that is not zero."""

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank of the delta."""
        return len(spectrum.s)


def resize(
    adapter: Folder,
    rank: Rank | Mapping[str, Rank] = 32,
    *,
    form: Form | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Resized:
    """Shrink a LoRA adapter: the best approximation of each module's delta at a lower rank, without the base.

    Args:
        adapter: A PEFT LoRA folder.
        rank: How many singular triplets of each delta to keep: an int is a rank, a float in (0, 1] the share of the
            delta's energy, a `RankRule` anything else; or a `budget` of all together. Or a rank for every delta that
            `spectra` names: a rule that looks at all spectra at once is a function from those to ranks.
        form: `portable`, one rank for the file; or `peft`, each module at its own rank, and the only one for adapters
            that hold biases or whole tensors. By default the first that can be.
        dtype: Of the saved factors; by default the adapter's.
        progress: Show a progress bar on stderr.

    Returns:
        The smaller adapter, with its report.

    Raises:
        AdapterError: The folder cannot be read, or holds more than plain LoRA deltas; or the form does not fit it.
        NothingToCarryError: Every delta is zero.
        ValueError: A rank or form makes no sense.
    """
    return _run([adapter], [1.0], rank, form=form, dtype=dtype, progress=progress)


def combine(
    adapters: Sequence[Folder],
    weights: Sequence[float] | None = None,
    rank: Rank | Mapping[str, Rank] | None = None,
    *,
    form: Form | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Resized:
    """Make one LoRA adapter of several of the same base: the weighted sum of their deltas.

    Their factors are put side by side, so the sum is exact; then it is cut as `resize` does. Biases add up too. A
    tensor that is kept whole takes the place of the base's: it can be kept where all that hold it agree on its values,
    and their weights add up to one.

    Args:
        adapters: PEFT LoRA folders.
        weights: Of their deltas; one each if None.
        rank: As `resize` takes it. None keeps the sum as it is: at most the ranks' sum.
        form: As `resize` takes it.
        dtype: Of the saved factors; by default the widest of the adapters'.
        progress: Show a progress bar on stderr.

    Returns:
        The combined adapter, with its report.

    Raises:
        AdapterError: A folder cannot be read, or holds more than plain LoRA deltas; or the form does not fit.
        MismatchError: They are not adapters of one model, or hold whole tensors that cannot be added.
        NothingToCarryError: The deltas are zero, or cancel.
        ValueError: An argument makes no sense.
    """
    if isinstance(adapters, str | os.PathLike):
        raise ValueError(f"`combine(adapters=...)` takes a list of folders. Got one: {str(adapters)!r}.")
    shares = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if not adapters:
        raise ValueError("`combine(adapters=...)` needs at least one adapter.")
    if len(shares) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters need as many weights. Got {len(shares)}: {shares}.")
    if not all(abs(share) < float("inf") for share in shares):
        raise ValueError(f"Weights must be finite numbers. Got {shares}.")
    return _run(adapters, shares, keep_all() if rank is None else rank, form=form, dtype=dtype, progress=progress)


def spectra(*adapters: Folder, weights: Sequence[float] | None = None, progress: bool = False) -> dict[str, Spectrum]:
    """The singular values of every delta of an adapter, or of a sum of several: what a rule for all of them looks at.

    Args:
        adapters: PEFT LoRA folders.
        weights: Of their deltas; one each if None.
        progress: Show a progress bar on stderr.

    Returns:
        By module; of stacked experts by `module[expert]`.

    Raises:
        AdapterError: A folder cannot be read, or holds more than plain LoRA deltas.
        MismatchError: They are not adapters of one model.
    """
    total = LoraSum([open_adapter(one) for one in adapters], weights or [1.0] * len(adapters))
    return _spectra(total, progress)


def _spectra(total: LoraSum, progress: bool) -> dict[str, Spectrum]:
    def work(name: str) -> list[Spectrum]:
        return [one.spectrum for one in _products(total, name)]

    found = _each(work, total.modules, progress, "Factoring")
    names = [name for name, each in zip(total.modules, found, strict=True) for name in deltas(name, len(each))]
    return dict(zip(names, (one for each in found for one in each), strict=True))


def deltas(module: str, count: int) -> list[str]:
    """The names of a module's deltas: the module's own, or one for each of its experts."""
    return [module] if count == 1 else [f"{module}[{expert}]" for expert in range(count)]


def _run(
    adapters: Sequence[Folder],
    weights: Sequence[float],
    rank: Rank | Mapping[str, Rank],
    *,
    form: Form | None,
    dtype: torch.dtype | None,
    progress: bool,
) -> Resized:
    if form not in (None, "portable", "peft"):
        raise ValueError(f"`form` must be portable or peft. Got {form!r}.")
    folders = [open_adapter(adapter) for adapter in adapters]
    total = LoraSum(folders, weights)
    chosen = form or ("peft" if total.extras() else "portable")
    if chosen == "portable" and (extras := total.extras()):
        raise AdapterError(f"{extras}: the portable form has no place for that. Use `{asked('form', 'peft')}`.")
    saved, whole = dtype or total.dtype(), total.whole()
    provenance = _provenance(folders, weights, rank, chosen)
    if isinstance(rank, budget):
        beside = total.beside(saved, whole) + 2 * len(json.dumps(provenance)) + 512
        # Stacked experts have one rank in the file, and so has everything in the portable form.
        padded = chosen == "portable" or total.has_experts()
        rank = dict(rank.within(_spectra(total, progress), item=saved.itemsize, beside=beside, padded=padded))
    rule = _rules(total, rank)

    def work(name: str) -> Cut:
        return _cut(total, name, rule, saved)

    cuts = tuple(_each(work, total.modules, progress, "Resizing" if len(folders) == 1 else "Combining"))
    if not any(part.norm for cut in cuts for part in cut.parts):
        labels = " and ".join(f"`{folder.label}`" for folder in folders)
        told = "hold deltas that cancel, or none" if len(folders) > 1 else "adds nothing: every delta is zero"
        raise NothingToCarryError(f"{labels} {told}.")
    return Resized(
        cuts=cuts,
        whole=whole,
        configs=tuple(folder.config for folder in folders),
        form=chosen,
        dtype=saved,
        bytes_before=sum(header.bytes for folder in folders for header in folder.headers.values()),
        provenance=provenance,
    )


def _cut(total: LoraSum, name: str, rule: Callable[[str], RankRule], dtype: torch.dtype) -> Cut:
    start = time.perf_counter()
    products = _products(total, name)
    names = deltas(name, len(products))
    # The experts of a stack have one rank in the file: that of the one that needs most.
    rank = max(rule(one)(product.spectrum) for one, product in zip(names, products, strict=True))
    kept = [product.cut(rank) for product in products]
    saved = [cast(part.a, part.b, dtype, one) for one, part in zip(names, kept, strict=True)]
    parts = [part._replace(a=a, b=b) for part, (a, b) in zip(kept, saved, strict=True)]
    return Cut(
        module=total.modules[name],
        parts=parts,
        bias=total.bias(name),
        rank_before=total.rank(name),
        true_rank=max(len(product.s) for product in products),
        bytes_before=total.bytes(name),
        seconds=time.perf_counter() - start,
    )


def _products(total: LoraSum, name: str) -> list[Product]:
    try:
        return [factor_product(*one) for one in total.factors(name)]
    except ValueError as error:
        raise AdapterError(f"`{name}` cannot be resized. {error}") from error


def _rules(total: LoraSum, rank: Rank | Mapping[str, Rank]) -> Callable[[str], RankRule]:
    """The rule of each delta, by its name."""
    if not isinstance(rank, Mapping):
        rule = each(rank)
        return lambda _: rule
    rules = {name: each(one) for name, one in rank.items()}
    names = [one for name, module in total.modules.items() for one in deltas(name, module.experts)]
    for name in names:
        if name not in rules:
            raise ValueError(f"No rank is given for `{name}`.")
    for name in rules:
        if name not in names:
            raise ValueError(f"A rank is given for `{name}`, which the adapter does not adapt.")
    return rules.__getitem__


def _each(work: Callable[[str], T], names: Iterable[str], progress: bool, title: str) -> list[T]:
    """The results for all modules, in order: as many at a time as PyTorch may use threads, one thread for each.

    The bits of a result do not depend on how many threads there are, and no more modules than those are in memory.
    """
    names = list(names)

    def named(name: str) -> tuple[str, T]:
        return name, work(name)

    with Workers(torch.get_num_threads(), torch_threads=1) as workers:
        bar = progress_bar(workers.map(named, names), total=len(names), desc=title, unit=" modules", progress=progress)
        found = dict(bar)
    return [found[name] for name in names]


def _provenance(
    folders: Sequence[AdapterFile], weights: Sequence[float], rank: Rank | Mapping[str, Rank], form: str
) -> dict[str, object]:
    told: object = {name: describe(each(one)) for name, one in rank.items()} if isinstance(rank, Mapping) else None
    config = folders[0].config
    return {
        "adapters": [
            {
                "adapter": folder.label,
                "base": folder.config.get("base_model_name_or_path"),
                "rank": max(module.rank for module in folder.modules.values()),
                "weight": weight,
            }
            for folder, weight in zip(folders, weights, strict=True)
        ],
        "base": config.get("base_model_name_or_path"),
        "base_revision": config.get("revision"),
        "options": {"form": form, "rule": told or describe(as_rule(rank))},  # type: ignore[arg-type]
        "versions": {
            "peft-posthoc": metadata.version("peft-posthoc"),
            "python": platform.python_version(),
            "safetensors": metadata.version("safetensors"),
            "torch": torch.__version__,
        },
    }
