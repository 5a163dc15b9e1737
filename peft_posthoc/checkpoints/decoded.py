"""A quantised checkpoint, seen as the weights that its codes stand for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from peft_posthoc.checkpoints import awq, bitsandbytes, gptq
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.coded import Coded
from peft_posthoc.checkpoints.view import Piece, View, same

# Each tells, from headers and configuration, which weights are stored its way.
_SCHEMES = (gptq.find, awq.find, bitsandbytes.find)


class Decoded(View):
    """A checkpoint with weights in place of codes, each decoded when it is read."""

    def __init__(self, checkpoint: Checkpoint, coded: Mapping[str, Coded]) -> None:
        """Wrap a checkpoint.

        Args:
            checkpoint: With codes.
            coded: By name, what the codes are those of.
        """
        places = {one.sources[0]: name for name, one in coded.items()}
        beside = {source for one in coded.values() for source in one.sources[1:]}
        pieces = {}
        for name in checkpoint.headers:
            if name in places:
                one = coded[places[name]]
                pieces[places[name]] = Piece(one.sources, one.header, one.make)
            elif name not in beside:
                pieces[name] = same(checkpoint, name)
        super().__init__(checkpoint, pieces, loadable=True, module=checkpoint.module)
        self._coded = coded

    def steps(self, name: str) -> Tensor | None:
        """Of a weight that is decoded, the grid's step at each value."""
        one = self._coded.get(name)
        return None if one is None else one.steps(*map(self.seen.read, one.sources))


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with weights in place of the codes that can be decoded; itself if it has none.

    Raises:
        CheckpointError: Codes are in a form of their format that is not read.
    """
    coded = {name: one for find in _SCHEMES for name, one in find(checkpoint).items()}
    return Decoded(checkpoint, coded) if coded else checkpoint


def as_decoded(checkpoint: Checkpoint) -> Checkpoint | None:
    """What the codes in a folder are decoded to, by the names of its files; None if it holds the weights themselves.

    Args:
        checkpoint: It, or a view of it that can still be loaded from the folder.
    """
    while isinstance(checkpoint, View) and checkpoint.folder is not None:
        if isinstance(checkpoint, Decoded):
            return checkpoint
        checkpoint = checkpoint.seen
    return None
