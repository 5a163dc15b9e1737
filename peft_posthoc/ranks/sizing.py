"""What a rule over all layers has to know of the file that its ranks go into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from peft_posthoc.linalg.spectrum import Spectrum


@runtime_checkable
class Sizing(Protocol):
    """A file of ranks, before anything is factored: shapes and costs, from headers alone."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """By weight, the two sides of its delta."""

    @property
    def numbers(self) -> Mapping[str, int]:
        """By weight, how many numbers of the file one triplet is; twice as many where it is carried twice."""

    @property
    def item(self) -> int:
        """Bytes of a number."""

    @property
    def padded(self) -> bool:
        """Whether all layers have one rank in the file, a safe one (the portable form)."""

    @property
    def tuned_bytes(self) -> int:
        """Of the tuned checkpoint."""


@runtime_checkable
class HeldSizing(Sizing, Protocol):
    """The same, of deltas that are factored."""

    @property
    def spectra(self) -> Mapping[str, Spectrum]:
        """By weight."""

    @property
    def shared(self) -> bool:
        """Whether stacked experts share a rank in the file."""

    def size(self, ranks: Mapping[str, int], *, params: bool) -> int:
        """Bytes of the tensors in the file, or how many numbers they hold.

        Args:
            ranks: By weight; the others have what they have.
            params: Count numbers.
        """

    def header(self, ranks: Mapping[str, int], digits: int) -> int:
        """Bytes of the file's header, where every tensor's entry has so many digits more."""
