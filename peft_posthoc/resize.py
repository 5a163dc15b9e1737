"""Adapters to smaller adapters: the best of a lower rank, from the factors alone; and the sum of several as one."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from peft_posthoc.budget import budget
from peft_posthoc.errors import AdapterError, MismatchError, NothingToCarryError
from peft_posthoc.layout import is_of_an_expert
from peft_posthoc.lora_folder import Factors, LoraFolder, Module
from peft_posthoc.peft_format import PREFIX
from peft_posthoc.product import Product, factor_product
from peft_posthoc.rank import Rank, RankRule, Spectrum, as_rule, describe, each
from peft_posthoc.resized import Cut, Resized
from peft_posthoc.svd import LowRank

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
    with ExitStack() as stack:
        total = _Sum([stack.enter_context(LoraFolder(one)) for one in adapters], weights or [1.0] * len(adapters))

        return _spectra(total, progress)


def _spectra(total: _Sum, progress: bool) -> dict[str, Spectrum]:
    def work(name: str) -> list[Spectrum]:
        return [one.spectrum for one in _products(total, name)]

    found = list(_each(work, total.modules, progress, "Factoring"))
    names = [name for name, each in zip(total.modules, found, strict=True) for name in deltas(name, len(each))]
    return dict(zip(names, (one for each in found for one in each), strict=True))


def deltas(module: str, count: int) -> list[str]:
    """What each delta of a module is called: the module, or each of its experts."""
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
    with ExitStack() as stack:
        folders = [stack.enter_context(LoraFolder(adapter)) for adapter in adapters]
        total = _Sum(folders, weights)
        chosen = form or ("peft" if total.extras() else "portable")
        if chosen == "portable" and (extras := total.extras()):
            raise AdapterError(f"{extras}: the portable form has no place for that. Use `--form peft`.")
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
            bytes_before=sum(folder.bytes() for folder in folders),
            provenance=provenance,
        )


class _Sum:
    """Several adapters as one: their modules, checked to fit, and what they add up to."""

    def __init__(self, folders: Sequence[LoraFolder], weights: Sequence[float]) -> None:
        self._parts = list(zip(folders, weights, strict=True))
        self.modules: dict[str, Module] = {}
        for folder in folders:
            for name, module in folder.modules.items():
                known = self.modules.setdefault(name, module)
                same = (known.kind, known.experts, known.a_shape[1:], known.b_shape[0])
                if same != (module.kind, module.experts, module.a_shape[1:], module.b_shape[0]):
                    raise MismatchError(
                        f"`{name}` is {_shape(known)} in `{folders[0].label}` and {_shape(module)} in `{folder.label}`:"
                        " they are not adapters of one model."
                    )
        if len(told := {tuple(sorted(own)) for one in folders if (own := one.config.get("target_parameters"))}) > 1:
            raise MismatchError(
                f"The adapters adapt different parameters ({' and '.join(map(str, sorted(told)))}); which tensors are "
                "whose in their files only the model can tell."
            )
        biased = [module for folder in folders for module in folder.modules.values() if module.bias]
        others = [module for module in self.modules.values() if module.kind in ("embedding", "experts")]
        if biased and others:
            raise MismatchError(
                f"One adapter holds a bias of `{biased[0].name}`, one adapts `{others[0].name}`: PEFT takes no adapter "
                "with both."
            )

    def factors(self, name: str) -> list[Factors]:
        """The factors of each delta, side by side."""
        each = [
            [Factors(one.a, one.b * weight) for one in folder.factors(name)]
            for folder, weight in self._parts
            if name in folder.modules
        ]
        return [
            Factors(torch.cat([one.a for one in same]), torch.cat([one.b for one in same], dim=1))
            for same in zip(*each, strict=True)
        ]

    def bias(self, name: str) -> Tensor | None:
        """The sum of what is added to the module's bias."""
        found = [(f.bias(name), weight) for f, weight in self._parts if name in f.modules]
        biases = [bias * weight for bias, weight in found if bias is not None]
        return torch.stack(biases).sum(dim=0) if biases else None

    def rank(self, name: str) -> int:
        """How many pairs are side by side."""
        return sum(folder.modules[name].rank for folder, _ in self._parts if name in folder.modules)

    def bytes(self, name: str) -> int:
        """What the module takes in the files."""
        held = [folder for folder, _ in self._parts if name in folder.modules]
        return sum(f.bytes_of(one) for f in held for one in f.modules[name].tensor_names())

    def dtype(self) -> torch.dtype:
        """The widest of the adapters'."""
        found = self._parts[0][0].dtype()
        for folder, _ in self._parts[1:]:
            found = torch.promote_types(found, folder.dtype())
        return found

    def has_experts(self) -> bool:
        """Whether some module is of one expert, or stacks them."""
        return any(module.kind == "experts" or is_of_an_expert(name) for name, module in self.modules.items())

    def beside(self, dtype: torch.dtype, whole: Mapping[str, Tensor]) -> int:
        """Bytes in a file of this that do not grow with the rank: biases, whole tensors, and what a header needs."""
        modules = self.modules.values()
        biases = [module.size[0] for module in modules] if any(module.bias for module in modules) else []
        names = [*(name for module in modules for name in module.tensor_names()), *whole]
        # An entry of the header: type, shape, and two places of up to 13 digits.
        header = sum(len(name) + 120 for name in names) + sum(len(module.name) + 160 for module in modules)
        return header + dtype.itemsize * sum(biases) + sum(tensor.nbytes for tensor in whole.values())

    def extras(self) -> str | None:
        """What there is beside factors, in words."""
        for folder, _ in self._parts:
            for module in folder.modules.values():
                if module.bias:
                    return f"`{folder.label}` holds a bias of `{module.name}`"
            if folder.whole:
                return f"`{folder.label}` holds `{folder.whole[0].removeprefix(PREFIX)}` whole"
        return None

    def whole(self) -> dict[str, Tensor]:
        """The tensors that take the place of the base's.

        Raises:
            MismatchError: The adapters do not agree on one, or their weights leave it between theirs and the base's.
        """
        found: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for folder, _ in self._parts for name in folder.whole):
            holders = [(folder, weight) for folder, weight in self._parts if name in folder.whole]
            first, inner = holders[0][0], name.removeprefix(PREFIX)
            found[name] = first.tensor(name)
            for other, _ in holders[1:]:
                if not torch.equal(found[name], other.tensor(name)):
                    raise MismatchError(
                        f"`{first.label}` and `{other.label}` both hold `{inner}` whole, with other values. Without "
                        "the base they cannot be added: merge each into the base, and extract from the sum."
                    )
            # The base's own weight, which PEFT saves beside adapted embeddings, is nobody's change.
            share = sum(weight for _, weight in holders)
            if not inner.endswith(".base_layer.weight") and abs(share - 1) > 1e-6:
                raise MismatchError(
                    f"`{first.label}` holds `{inner}` whole, and its weight is {share:g}: what is between it and the "
                    "base's is not known without the base. Give those that hold it weights that add up to 1."
                )
        return found


def _cut(total: _Sum, name: str, rule: Callable[[str], RankRule], dtype: torch.dtype) -> Cut:
    start = time.perf_counter()
    products = _products(total, name)
    names = deltas(name, len(products))
    # The experts of a stack have one rank in the file: that of the one that needs most.
    rank = max(rule(one)(product.spectrum) for one, product in zip(names, products, strict=True))
    parts = [_saved(product.cut(rank), dtype, name) for product in products]
    bias = total.bias(name)
    return Cut(
        module=total.modules[name],
        parts=parts,
        bias=None if bias is None else bias.to(dtype),
        rank_before=total.rank(name),
        true_rank=max(len(product.s) for product in products),
        bytes_before=total.bytes(name),
        seconds=time.perf_counter() - start,
    )


def _saved(factors: LowRank, dtype: torch.dtype, name: str) -> LowRank:
    a, b = factors.a.to(dtype), factors.b.to(dtype)
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(f"The factors of `{name}` overflow {dtype}. Choose another `--dtype`.")
    return factors._replace(a=a, b=b)


def _products(total: _Sum, name: str) -> list[Product]:
    try:
        return [factor_product(*one) for one in total.factors(name)]
    except ValueError as error:
        raise AdapterError(f"`{name}` cannot be resized. {error}") from error


def _rules(total: _Sum, rank: Rank | Mapping[str, Rank]) -> Callable[[str], RankRule]:
    """By the name of a delta, its rule."""
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


def _each(work: Callable[[str], T], names: Iterable[str], progress: bool, title: str) -> Iterator[T]:
    """What becomes of each module, in order: as many at a time as PyTorch may use threads, one thread for each.

    The bits of a result do not depend on how many threads there are, and no more modules than those are in memory.
    """
    names, threads = list(names), torch.get_num_threads()
    running: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool, tqdm(total=len(names), desc=title, unit=" modules", disable=not progress) as bar:
            try:
                for name in names:
                    running.append(pool.submit(work, name))
                    if len(running) > threads:
                        yield running.popleft().result()
                        bar.update()
                while running:
                    yield running.popleft().result()
                    bar.update()
            finally:
                for future in running:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)


def _provenance(
    folders: Sequence[LoraFolder], weights: Sequence[float], rank: Rank | Mapping[str, Rank], form: str
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


def _shape(module: Module) -> str:
    m, n = module.size
    stack = f"{module.experts} x " if module.experts > 1 else ""
    return f"{module.kind} {stack}{m} x {n}"
