"""Hold on to files that may be deleted before they are needed: a checkpoint's weights, a finished adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peft_posthoc.checkpoints.beside import text_files_in
from peft_posthoc.checkpoints.model_files import is_index, shards_of, weight_files
from peft_posthoc.errors import CheckpointError
from peft_posthoc.files import staged


@contextmanager
def remade(folder: Path, *, what: str) -> Iterator[Path]:
    """Make a folder anew, of which all files are ours: `staged`, with nothing in it to keep.

    Args:
        folder: The folder. It is replaced when the `with` block ends well.
        what: What messages call it.

    Yields:
        Where to make it.

    Raises:
        AdapterError: It cannot be written.
    """
    ours = {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.is_dir() else set()
    with staged(folder, what=what, force=True, ours=ours) as new:
        new.mkdir()
        yield new


def pin(checkpoint: Path, to: Path) -> Path:
    """Hold on to a checkpoint's weights when the checkpoint itself may be rotated away.

    Raises:
        CheckpointError: There are no weights that can be read.
    """
    return hold(checkpoint, [*_weights(checkpoint), "config.json", *text_files_in(checkpoint)], to)


def hold(folder: Path, names: Iterable[str], to: Path) -> Path:
    """Put hard links to files of a folder into a new folder, or copies where links cannot be made.

    A link takes microseconds and no space; what is linked stays when the first folder is deleted.

    Args:
        folder: Where the files are.
        names: Theirs, relative to the folder; what is not there is left out.
        to: The new folder. If there is one, it is replaced.

    Raises:
        AdapterError: It cannot be written.
    """
    with remade(to, what=f"What is held of `{folder}`") as half:
        for name in names:
            source, target = folder / name, half / name
            if not source.is_file():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # Where the files are links, as in the hub's cache, what they lead to is held.
            source = source.resolve()
            try:
                os.link(source, target)
            except OSError:  # another file system, or one without links
                shutil.copy2(source, target)
    return to


def _weights(checkpoint: Path) -> list[str]:
    """The files that hold the weights, relative to the checkpoint."""
    names = {path.name for path in checkpoint.iterdir()} if checkpoint.is_dir() else set()
    chosen = weight_files(names)
    if chosen and is_index(chosen[0]):
        return [chosen[0], *sorted(set(shards_of(checkpoint / chosen[0]).values()))]
    if chosen:
        return chosen
    # FSDP's sharded form: one folder with a file for each process.
    sharded = sorted(
        path.relative_to(checkpoint) for path in checkpoint.glob("pytorch_model_fsdp*/*") if path.is_file()
    )
    if sharded:
        return [str(path) for path in sharded]
    if any(checkpoint.glob("global_step*/*zero_pp_rank*")):
        raise CheckpointError(
            f"`{checkpoint}` holds DeepSpeed's own partitions, which are pickles and not read. Give the callback to "
            "the Trainer, where it takes the weights from the live model; or let DeepSpeed save whole ones: "
            '`"stage3_gather_16bit_weights_on_model_save": true` in its configuration.'
        )
    raise CheckpointError(f"There are no weights in `{checkpoint}`.")
