"""Ranks of all layers together, within a size.

The size is that of the file with the weights, `adapter_model.safetensors`, with its header: what an engine loads. The
configuration and the report lie beside it and are not counted.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from peft_posthoc.linalg.spectrum import RankRule, Spectrum
from peft_posthoc.ranks.allocate import allocate, uniform
from peft_posthoc.ranks.rules import check_limits, fixed
from peft_posthoc.ranks.safe import safe_rank
from peft_posthoc.ranks.sizing import HeldSizing, Sizing
from peft_posthoc.ranks.weighting import Weighting, balanced
from peft_posthoc.text import asked

# A layer is factored up to this many times the rank that all have if all have the same.
_DEEP = 4
_BALANCED = balanced()
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class budget:
    """Ranks of all layers together, such that the file with the weights has at most this size.

    The portable form has one rank for all, so there it is the largest that fits, whatever the weighting.

    Args:
        size: In bytes; or in words, such as `64MB`, `1.5GiB`, or `2%` of the tuned checkpoint.
        params: In place of `size`: how many numbers the file holds.
        weighting: What energy is worth; None: all layers have the same rank, as far as they are large enough.
        floor: The share of that rank that every layer has in any case.
        most: The highest rank.
        least: The lowest rank, but for smaller layers.
        multiple: Ranks are multiples of this, but for those of smaller layers.

    Raises:
        ValueError: The size is none, or the limits leave no rank.
    """

    size: int | str | None = None
    params: int | None = None
    weighting: Weighting | None = _BALANCED
    floor: float = 0.75
    most: int | None = None
    least: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        if (self.size is None) == (self.params is None):
            raise ValueError("A budget has a size or a number of parameters, one of them.")
        check_limits(self.most, self.least, self.multiple)
        self.limit(10**9)

    def limit(self, tuned_bytes: int) -> int:
        """The bytes, or numbers, that the file may have.

        Args:
            tuned_bytes: Of the tuned checkpoint.

        Raises:
            ValueError: The size is none.
        """
        if self.params is not None:
            if isinstance(self.params, bool) or not isinstance(self.params, int) or self.params < 1:
                raise ValueError(f"A number of parameters must be whole and at least 1. Got {self.params!r}.")
            return self.params
        found = re.fullmatch(r"(\d{1,30}(?:\.\d{0,30})?|\.\d{1,30}) *([kmg]i?b?|b|%)?", str(self.size), re.I)
        if isinstance(self.size, bool) or found is None or not float(found[1]):
            raise ValueError(
                f"A budget is a size such as 64MB, 1.5GiB or 2% of the tuned checkpoint. Got {self.size!r}."
            )
        unit = tuned_bytes / 100 if found[2] == "%" else _UNITS[f"{(found[2] or '').upper().removesuffix('B')}B"]
        return int(float(found[1]) * unit)

    def bounds(self, sizing: Sizing) -> dict[str, RankRule]:
        """As far as the size can reach: by a few times the rank that all have if all have the same.

        Raises:
            ValueError: The size is below that of the smallest adapter, if every weight has changed.
        """
        limit, costs, shapes = self.limit(sizing.tuned_bytes), self._costs(sizing), sizing.shapes
        least, padded = self._least(padded=sizing.padded), sizing.padded
        smallest = sum((least if padded else min(least, *shapes[name])) * costs[name] for name in costs)
        if smallest > limit:
            raise self._too_small(limit, smallest)
        if padded:
            top = safe_rank(max(min(shape) for shape in shapes.values()))
            rank = max(self._safe(min(limit // sum(costs.values()), top)), default=least)
        else:
            rank = uniform(shapes, costs, limit, multiple=self.multiple)
        deep = rank if self.weighting is None or padded else _DEEP * rank
        return {name: fixed(max(min(deep, self.most or deep), least)) for name in costs}

    def choose(self, sizing: HeldSizing, by_hand: Collection[str] = ()) -> dict[str, int]:
        """The ranks within the size.

        Raises:
            ValueError: The size is below that of the smallest adapter.
        """
        limit = self.limit(sizing.tuned_bytes)
        free = {name: spectrum for name, spectrum in sizing.spectra.items() if name not in by_hand}
        highest = max((len(one.s) for one in sizing.spectra.values()), default=0)

        def at(rank: int) -> dict[str, int]:
            return {name: min(rank, len(one.s)) for name, one in free.items()}

        def counted(rank: int) -> int:
            return sizing.size(at(rank), params=self.params is not None)

        least = self._least(padded=sizing.padded)
        start = 0  # No parameters are in a header.
        if self.params is None:
            # With room for the digits of higher ranks and later places.
            start = sizing.header(at(least), len(str(highest)) + 2 * len(str(limit))) + 8
        used = start + counted(least)
        if used > limit:
            # A budget of more digits has a longer header.
            raise self._too_small(limit, used + (8 * len(free) + 16 if self.params is None else 0))
        if sizing.padded:
            ranks = self._safe(safe_rank(highest))
            fit = bisect_right(ranks, limit - start, key=counted)
            return at(ranks[fit - 1] if fit else least)
        costs = {name: cost for name, cost in self._costs(sizing).items() if name in free}
        room = limit - used + sum(rank * costs[name] for name, rank in at(least).items())
        most = self.most // self.multiple * self.multiple if self.most else None
        level = least
        for step in (2**i for i in reversed(range(highest.bit_length()))):
            higher = level + step * self.multiple
            if higher <= min(most or higher, highest + self.multiple) and start + counted(higher) <= limit:
                level = higher
        # Stacked experts share one rank: nothing is gained by giving some of them less.
        if self.weighting is None or sizing.shared:
            return at(level)
        floor = max(int(self.floor * level) // self.multiple * self.multiple, least)
        return allocate(free, costs, room, self.weighting, least=floor, most=most, multiple=self.multiple)

    def within(self, spectra: Mapping[str, Spectrum], *, item: int, beside: int, padded: bool) -> dict[str, int]:
        """Ranks of deltas that are known already, such as an adapter's own.

        Args:
            spectra: By delta.
            item: Bytes of a number in the file.
            beside: Bytes that do not grow with the ranks: header, biases, whole tensors.
            padded: Whether all have one rank in the file, a safe one (the portable form).

        Raises:
            ValueError: The size is a share of a checkpoint that is not there, or below the smallest adapter.
        """
        if str(self.size).endswith("%"):
            raise ValueError(
                f"`{asked('size', self.size)}` is a share of the tuned checkpoint, which is not there: give a size."
            )
        if self.params is not None:
            item, beside = 1, 0
        limit, costs = self.limit(0), {name: item * sum(one.shape) for name, one in spectra.items()}
        room, all_of = limit - beside, sum(costs.values())
        top, least = (
            max((len(one.s) for one in spectra.values()), default=1),
            self._least(padded=True) if padded else self.least,
        )
        if padded:
            fitting = [rank for rank in self._safe(max(safe_rank(top), least)) if rank * all_of <= room]
            if not fitting:
                raise self._too_small(limit, beside + least * all_of)
            return dict.fromkeys(spectra, fitting[-1])
        held = {name: (len(one.s), len(one.s)) for name, one in spectra.items()}
        level = min(uniform(held, costs, room, multiple=self.multiple), self.most or top)
        if level < least:
            smallest = sum(min(least, len(one.s)) * costs[name] for name, one in spectra.items())
            raise self._too_small(limit, beside + smallest)
        if self.weighting is None:
            return {name: min(level, len(one.s)) for name, one in spectra.items()}
        floor = max(int(self.floor * level) // self.multiple * self.multiple, least)
        return allocate(spectra, costs, room, self.weighting, least=floor, most=self.most, multiple=self.multiple)

    def _costs(self, sizing: Sizing) -> dict[str, int]:
        """By weight, what one triplet takes of the size."""
        item = sizing.item if self.params is None else 1
        return {name: item * count for name, count in sizing.numbers.items()}

    def _least(self, *, padded: bool) -> int:
        least = -(-self.least // self.multiple) * self.multiple
        if not padded:
            return least
        found = self._safe(least + 16 * self.multiple)
        if not found:
            raise ValueError("Between the limits lies no rank that the portable form has: 8, or a multiple of 16.")
        return found[0]

    def _safe(self, most: int) -> list[int]:
        """The ranks that the portable form may have, up to `most`."""
        most, step = min(most, self.most or most), math.lcm(16, self.multiple)
        eight = [8] if most >= 8 and 8 % self.multiple == 0 and self.least <= 8 else []
        return [*eight, *range(-(-self.least // step) * step, most + 1, step)]

    def _too_small(self, limit: int, least: int) -> ValueError:
        unit = "bytes" if self.params is None else "parameters"
        given = asked("size", self.size) if self.params is None else asked("params", self.params)
        more = "" if self.params is not None or not str(self.size).endswith("%") else f" ({limit:,} {unit})"
        return ValueError(
            f"`{given}`{more} is below the smallest adapter of these layers, {least:,} {unit}. Give more, or carry "
            f"fewer layers (`{asked('exclude', None)}`)."
        )
