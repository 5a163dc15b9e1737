"""Pairs of weights to factored layers, one at a time; or what is lost by leaving a weight out."""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeGuard

import torch
from torch import Tensor

from peft_posthoc.compute.device import Devices, all_of
from peft_posthoc.compute.precision import full_precision
from peft_posthoc.compute.workers import Workers
from peft_posthoc.errors import CheckpointError, PosthocError
from peft_posthoc.extraction.delta import Delta, Pair, difference, not_finite, served
from peft_posthoc.extraction.fate import Factored, Fate, Whole
from peft_posthoc.extraction.outcomes import Kept, Layer, Outcome, Skipped
from peft_posthoc.extraction.reasons import CODED, LeftOut
from peft_posthoc.linalg.noise import error_of, rounding
from peft_posthoc.linalg.norms import frobenius
from peft_posthoc.linalg.spectrum import RankRule, Spectrum, in_advance
from peft_posthoc.linalg.svd import truncated_svd
from peft_posthoc.ranks.rules import signal_rank


@contextlib.contextmanager
def factor_pairs(
    pairs: Iterable[Pair],
    fates: Mapping[str, Fate],
    *,
    largest: int = 0,
    exact: bool = False,
    device: torch.device | None = None,
) -> Iterator[Iterator[Outcome]]:
    """Factor the weights that are carried, and measure the others, in whatever order they come.

    Args:
        pairs: Weights before and after.
        fates: By weight, what becomes of it. Of what is factored the rule is known.
        largest: Bytes of the largest weight.
        exact: Use LAPACK's full SVD for every weight.
        device: Where to work, the CPU if None; `cuda` is all GPUs, each with weights of its own.

    Yields:
        An iterator over the results, one for every pair, each as it is ready. It raises `CheckpointError` where a value
        is NaN or infinite.
    """
    with at_work(largest, exact=exact, device=device) as (workers, devices):

        def work(pair: Pair) -> Outcome:
            with devices.one() as where:
                return outcome_of(pair, fates[pair.name], exact=exact, device=where)

        yield workers.map(work, pairs, size=lambda pair: pair.bytes)


@contextlib.contextmanager
def at_work(
    largest: int, *, exact: bool = False, device: torch.device | None = None
) -> Iterator[tuple[Workers, Devices]]:
    """The threads that factor weights, and the devices that they do it on; the threads end with the `with` block.

    Every weight is one thread's, on the CPU as many weights at a time as PyTorch may use threads, on GPUs two on each,
    so that one is copied there while the other is computed with. With a large one idle threads help, a part of it each:
    the bits of a result do not depend on how many threads there are, and nobody waits for a thread that other programs
    have put off the processor.
    """
    found = all_of(device or torch.device("cpu"))
    # However many threads there are, the deltas in memory are never more than twice the largest, for each device;
    # LAPACK's full SVD takes three times as much beside each, so that one must do.
    room = (1 if exact else 2) * largest * len(found)
    found *= torch.get_num_threads() if found[0].type == "cpu" else 2
    with full_precision(), Workers(len(found), room=room, torch_threads=1) as workers:
        yield workers, Devices(found)


def outcome_of(pair: Pair, fate: Fate, *, exact: bool = False, device: torch.device | None = None) -> Outcome:
    """What becomes of one weight.

    Raises:
        CheckpointError: A value is NaN or infinite.
    """
    try:
        pair = pair.on(device or torch.device("cpu"))
        if isinstance(fate, Factored):
            return _factor(pair, fate, exact=exact)
        return _keep(pair, fate) if isinstance(fate, Whole) else _leave_out(pair, fate)
    except PosthocError:
        raise
    except Exception as error:
        error.add_note(f"While extracting `{pair.name}`.")
        raise


def _factor(pair: Pair, fate: Factored, *, exact: bool) -> Layer | Skipped:
    start, rule = time.perf_counter(), fate.rule
    if rule is None:
        raise ValueError(f"`{pair.name}` has no rank rule.")
    delta = difference(pair)
    if delta.norm == 0:
        return Skipped(pair.name, "unchanged", 0.0, delta.base_norm, None, time.perf_counter() - start)
    matrix = fate.kind.matrix(delta.values)
    told = _Told(rule, pair, delta)
    # A rank that is known in advance makes the first block wide enough; noise is then told of what was found.
    asks = told if in_advance(rule) is None else rule
    # The seed depends on the name alone: same inputs, same factors, in whatever order weights come.
    found = truncated_svd(matrix, asks, exact=exact, seed=zlib.crc32(pair.name.encode()), norm=delta.norm)
    if asks is rule:
        told(Spectrum(found.s, found.norm**2, (matrix.shape[0], matrix.shape[1])))
    found = found._replace(a=found.a.cpu(), b=found.b.cpu())
    grids = [None if steps is None else error_of(steps) for steps in pair.steps]
    return Layer(
        pair.name,
        found,
        delta.base_norm,
        time.perf_counter() - start,
        told.noise,
        told.signal,
        grid=(grids[0] or 0.0, grids[1] or 0.0) if any(one is not None for one in grids) else None,
        served=served(pair),
    )


class _Told:
    """A rule that is told of the base's norm, and of the noise on the delta where it asks for that."""

    def __init__(self, rule: RankRule, pair: Pair, delta: Delta) -> None:
        self._rule, self._base_norm, self._measures = rule, delta.base_norm, getattr(rule, "measures_noise", False)
        both = pair.base is not None and pair.tuned is not None
        self.noise = rounding(*pair[1:3], delta.values, pair.steps) if self._measures and both else None  # type: ignore[arg-type]
        self.signal: int | None = None

    def __call__(self, spectrum: Spectrum) -> int:
        told = spectrum._replace(noise=self.noise, base_norm=self._base_norm)
        self.signal = signal_rank(told) if self._measures else None
        return self._rule(told)


def _keep(pair: Pair, fate: Whole) -> Kept:
    start = time.perf_counter()
    if pair.base is None and pair.tuned is not None:  # A new head: all of it is the difference.
        pair = pair._replace(base=torch.zeros_like(pair.tuned))
    delta = difference(pair)
    value = delta.values if fate.as_bias or pair.tuned is None else pair.tuned.clone()
    return Kept(pair.name, value.cpu(), delta.norm, delta.base_norm, time.perf_counter() - start)


def _leave_out(pair: Pair, fate: LeftOut) -> Skipped:
    start = time.perf_counter()
    if fate.reason in CODED:
        lost = 0.0 if _same_bits(pair.base, pair.tuned) else None
        norm = frobenius(pair.tuned) if _is_plain(pair.tuned) and not _is_plain(pair.base) else None
        return Skipped(pair.name, fate.text, lost, None, norm, time.perf_counter() - start)
    if pair.base is not None and pair.tuned is not None and pair.base.shape == pair.tuned.shape:
        delta = difference(pair)
        return Skipped(pair.name, fate.text, delta.norm, delta.base_norm, None, time.perf_counter() - start)
    base_norm, tuned_norm = (None if tensor is None else frobenius(tensor) for tensor in (pair.base, pair.tuned))
    if not all(math.isfinite(norm) for norm in (base_norm, tuned_norm) if norm is not None):
        raise CheckpointError(not_finite(pair))
    return Skipped(pair.name, fate.text, None, base_norm, tuned_norm, time.perf_counter() - start)


def _is_plain(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Tell whether a tensor holds numbers, and no codes."""
    return tensor is not None and tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1


def _same_bits(base: Tensor | None, tuned: Tensor | None) -> bool:
    if base is None or tuned is None or base.shape != tuned.shape or base.dtype is not tuned.dtype:
        return False
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (base, tuned)))
