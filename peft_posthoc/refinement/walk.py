"""Base + adapter and the tuned model, run side by side on the same texts, a stretch at a time; in between, on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from peft_posthoc.errors import OutputError, one_line
from peft_posthoc.refinement.chain import Chain
from peft_posthoc.texts.sequences import Batch

Side = Literal[0, 1]
"""Base + adapter, or the tuned model."""
SIDES: tuple[Side, Side] = (0, 1)
AT_ONCE = 256
"""Tokens whose logits are there at a time."""


class Piece(NamedTuple):
    """Some tokens on their way through a stretch, of both models."""

    run: tuple[Callable[[], Tensor], Callable[[], Tensor]]
    """What comes out, of either side: hidden states, or at the end logits."""
    counted: Tensor
    """Of the tokens, one after the other, those that are no padding; at the end all, of those after which what comes
    next counts."""


class Stretch(NamedTuple):
    """A part of both models: what comes before the blocks, a block, or what comes after them."""

    role: Literal["entry", "block", "exit"]
    """What comes out of the exit are logits."""
    pieces: Callable[[int], list[Piece]]
    """Of a batch of texts."""
    held: Callable[[], AbstractContextManager[object]]
    """Keeps its weights in memory."""


class Walk:
    """Both models on some texts.

    What goes from a stretch to the next lies in a folder of its own, which is gone when the walk ends, however it ends.

    Args:
        chains: Base + adapter, and the tuned model.
        batches: Of texts.
    """

    def __init__(self, chains: tuple[Chain, Chain], batches: Sequence[Batch]) -> None:
        self._chains, self.batches = chains, batches
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phlora-")))
            for chain in self._chains:
                stack.enter_context(chain.rest_held())
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    @property
    def count(self) -> int:
        """How many stretches there are."""
        return len(self._chains[0].blocks) + 2

    def stretches(self) -> Iterator[Stretch]:
        """One after the other: what a stretch gives with the factors that it has by then is what the next one reads."""
        end = len(self._chains[0].blocks)
        for index in range(-1, end):
            stretch = self._stretch(index)
            if index < 0:
                with stretch.held(), torch.no_grad():
                    for chain in self._chains:
                        chain.check(self.batches[0])
            yield stretch
            with stretch.held(), torch.no_grad():
                for place in range(len(self.batches)):
                    (piece,) = stretch.pieces(place)
                    for side in SIDES:
                        self._write(piece.run[side](), self._file(side, place))
        yield Stretch("exit", self._ends, partial(self._held, end))

    def _stretch(self, index: int) -> Stretch:
        def run(side: Side, place: int) -> Tensor:
            chain, batch = self._chains[side], self.batches[place]
            return chain.enter(batch) if index < 0 else chain.through(index, batch, self._read(side, place))

        def pieces(place: int) -> list[Piece]:
            return [Piece((partial(run, 0, place), partial(run, 1, place)), self.batches[place].mask.bool().flatten())]

        return Stretch("entry" if index < 0 else "block", pieces, partial(self._held, index))

    def _ends(self, place: int) -> list[Piece]:
        mask = self.batches[place].counted.bool()
        parts = [self._read(side, place)[mask].split(min(AT_ONCE, mask.shape[1])) for side in SIDES]
        leave = [chain.leave for chain in self._chains]
        return [
            Piece((partial(leave[0], mine), partial(leave[1], theirs)), mask.new_ones(len(mine)))
            for mine, theirs in zip(*parts, strict=True)
        ]

    @contextmanager
    def _held(self, index: int) -> Iterator[None]:
        with self._chains[0].held(index), self._chains[1].held(index):
            yield

    def _file(self, side: Side, place: int) -> Path:
        return self._folder / f"{side}-{place}.pt"

    def _write(self, hidden: Tensor, file: Path) -> None:
        try:
            torch.save(hidden, file)
        except (OSError, RuntimeError) as error:  # PyTorch's own, of a full disk too.
            raise OutputError(
                f"What goes from a block to the next cannot be kept in `{self._folder}`: {one_line(error)} Is the disk "
                "full? Set TMPDIR to a folder on another."
            ) from error

    def _read(self, side: Side, place: int) -> Tensor:
        found: Tensor = torch.load(self._file(side, place), weights_only=True)
        return found
