"""The tensors of one name in all checkpoints that are compared, read ahead of the work."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.compute.workers import Workers
from peft_posthoc.extraction.delta import Pair
from peft_posthoc.lineage.kin import Kin


def read_pair(
    base: Checkpoint,
    tuned: Checkpoint,
    name: str,
    *,
    served: Checkpoint | None = None,
    only: Container[str] = (),
    kin: Kin | None = None,
) -> Pair:
    """The tensor of that name in both checkpoints.

    Of those in `only`, what the served base has too, and the steps of the grids of what is quantised.

    Raises:
        MismatchError: By what `kin` has seen they are no states of one model.
    """
    before, after = (side.read(name) if name in side.headers else None for side in (base, tuned))
    pair = Pair(name, before, after)
    if name in only:
        from_served = None if served is None else served.read(name)
        pair = pair._replace(served=from_served, steps=(base.steps(name), tuned.steps(name)))
    if kin is not None:
        kin.see(before, after, coded=any(one is not None for one in pair.steps))
    return pair


@contextlib.contextmanager
def read_pairs(
    base: Checkpoint,
    tuned: Checkpoint,
    names: Iterable[str],
    *,
    served: Checkpoint | None = None,
    only: Container[str] = (),
    kin: Kin | None = None,
) -> Iterator[Iterator[Pair]]:
    """The tensors of these names, as `read_pair` has them, one pair at a time, the next one read ahead.

    They are read in a thread of their own: safetensors makes an unrelated error of a Ctrl-C that comes while it reads,
    and Ctrl-C only ever comes to the main thread.
    """
    # Codes are decoded there, in many short steps: on more cores each waits for threads that factor meanwhile, and all
    # takes up to ten times as long.
    with Workers(waiting=1, torch_threads=1) as reader:
        yield reader.map(lambda name: read_pair(base, tuned, name, served=served, only=only, kin=kin), names)
