"""A checkpoint seen under other names or in other pieces, each made when it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header, place_of


class Piece(NamedTuple):
    """A tensor that is made of others."""

    sources: tuple[str, ...]
    """In the checkpoint itself."""
    header: Header
    make: Callable[..., Tensor]
    """From the sources, in their order."""


class View(Checkpoint):
    """Another checkpoint, with other tensors made of its own."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        pieces: Mapping[str, Piece],
        *,
        loadable: bool = False,
        module: nn.Module | None = None,
    ) -> None:
        """Wrap a checkpoint.

        Args:
            checkpoint: What is read.
            pieces: By the name it is seen under, every tensor.
            loadable: Whether transformers can load the model from its folder all the same.
            module: The live module that has these names, if there is one.
        """
        self.seen = checkpoint
        self._pieces = pieces
        # Its own, if its files still fit.
        self.folder = checkpoint.folder if loadable else None
        self.beside = place_of(checkpoint)
        self.module = module
        self.label = checkpoint.label
        self.revision = checkpoint.revision
        self.identity = checkpoint.identity
        self.config, self.metadata = checkpoint.config, checkpoint.metadata
        self.to_stream: int = getattr(checkpoint, "to_stream", 0)
        self.doubt: str | None = getattr(checkpoint, "doubt", None)
        self.sequential, self.to_fetch = checkpoint.sequential, checkpoint.to_fetch
        self.headers = {name: piece.header for name, piece in pieces.items()}
        self._held: dict[str, Tensor] = {}
        self._to_come = Counter(source for piece in pieces.values() for source in piece.sources)

    def read(self, name: str) -> Tensor:
        """The tensor of that name."""
        piece = self._pieces[name]
        return piece.make(*map(self._source, piece.sources))

    def steps(self, name: str) -> Tensor | None:
        """The steps of the grids, put together as the values are."""
        piece = self._pieces[name]
        steps = [self.seen.steps(source) for source in piece.sources]
        return piece.make(*steps) if steps and all(one is not None for one in steps) else None

    def coded_as(self, name: str) -> str | None:
        """The format of the first that is decoded, of what the tensor is made of."""
        formats = map(self.seen.coded_as, self._pieces[name].sources)
        return next((one for one in formats if one is not None), None)

    def sources(self, name: str) -> tuple[str, ...]:
        """What the tensor is made of, by the names in the checkpoint that is seen."""
        return self._pieces[name].sources

    def is_as_it_is(self, name: str) -> bool:
        """Tell whether a tensor is one of the checkpoint that is seen, unchanged."""
        return self._pieces[name].make is _itself

    def stored_names(self, name: str) -> set[str]:
        """The checkpoint's own names of what the tensor is made of."""
        return {own for source in self.sources(name) for own in stored_names(self.seen, source)}

    def in_stored_order(self) -> list[str]:
        """The names, in the order in which what they are made of is stored."""
        at = {name: place for place, name in enumerate(in_stored_order(self.seen))}
        return sorted(self.headers, key=lambda name: max(at[source] for source in self._pieces[name].sources))

    def _source(self, name: str) -> Tensor:
        if not self.sequential:
            return self.seen.read(name)
        # It can be read once: what other pieces are made of, too, is kept until the last of them is read.
        tensor = self._held.pop(name) if name in self._held else self.seen.read(name)
        self._to_come[name] -= 1
        if self._to_come[name] > 0:
            self._held[name] = tensor
        return tensor


def stored_names(checkpoint: Checkpoint, name: str) -> set[str]:
    """The tensors that one is made of, by the names that they are stored under."""
    return checkpoint.stored_names(name) if isinstance(checkpoint, View) else {name}


def in_stored_order(checkpoint: Checkpoint) -> list[str]:
    """The names of a checkpoint's tensors, in the order in which what they are made of is stored."""
    return checkpoint.in_stored_order() if isinstance(checkpoint, View) else list(checkpoint.headers)


def as_handed(checkpoint: Checkpoint) -> Checkpoint | None:
    """What transformers is handed, under the names that it knows: what codes are decoded to; None if it reads files.

    Args:
        checkpoint: It, or a view of it.
    """
    while isinstance(checkpoint, View) and not checkpoint.handed:
        checkpoint = checkpoint.seen
    return checkpoint if checkpoint.handed else None


def same(checkpoint: Checkpoint, name: str) -> Piece:
    """A tensor of the checkpoint as it is."""
    return Piece((name,), checkpoint.headers[name], _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
