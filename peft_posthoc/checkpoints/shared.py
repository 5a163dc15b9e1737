"""A checkpoint that several take tensors from: each is read once, and held until the last of them has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.view import View, same


class Shared(View):
    """Another checkpoint, whose tensors are held as long as steps are to come that need them.

    Tensors that no step was told to need are read as often as they are asked for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        pieces = {name: same(checkpoint, name) for name in checkpoint.headers}
        super().__init__(checkpoint, pieces, loadable=True, module=checkpoint.module)
        self.last: dict[str, int] = {}
        """By tensor, the last step that needs it."""
        self._tensors: dict[tuple[str, str], Tensor] = {}

    def expect(self, step: int, names: Iterable[str]) -> None:
        """Say which tensors a step needs; in the order of the steps."""
        self.last.update(dict.fromkeys(names, step))

    def done(self, step: int) -> None:
        """Let go of what no later step needs."""
        self._tensors = {key: tensor for key, tensor in self._tensors.items() if self.last[key[1]] > step}

    def read(self, name: str) -> Tensor:
        """The tensor of that name."""
        tensor = self._once("values", name, super().read)
        assert tensor is not None
        return tensor

    def steps(self, name: str) -> Tensor | None:
        """The grid's step at each value of one that is decoded."""
        return self._once("steps", name, super().steps)

    def _once(self, what: str, name: str, read: Callable[[str], Tensor | None]) -> Tensor | None:
        found = self._tensors.get((what, name))
        if found is None and (found := read(name)) is not None and name in self.last:
            self._tensors[what, name] = found
        return found

    def within(self, seen: Checkpoint, name: str) -> set[str]:
        """The tensors of this checkpoint that one of a view of it is made of."""
        if seen is self:
            return {name}
        if not isinstance(seen, View):
            return set()
        return {own for source in seen.sources(name) for own in self.within(seen.seen, source)}
