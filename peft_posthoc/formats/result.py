"""The account of an export, and the check of the place where it is written."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_posthoc.adapters.card import REPORT
from peft_posthoc.adapters.config import CONFIG
from peft_posthoc.adapters.named_base import another_base
from peft_posthoc.errors import AdapterError
from peft_posthoc.files import check_apart, check_free, files_in
from peft_posthoc.json_file import read_json
from peft_posthoc.text import asked, size

if TYPE_CHECKING:
    import torch

    from peft_posthoc.adapters.on_model import AdapterOnModel

# What the header of an adapter in GGUF says: the key, the type of its value (a string), and the value.
_ADAPTER = b"general.type" + struct.pack("<IQ", 8, 7) + b"adapter"
# What the header of a safetensors file of ours says, which is sorted: an export, not an adapter's weights.
_EXPORTED = re.compile(rb'"phlora":"[^}]*\\"to\\":')


class Out(NamedTuple):
    """Where an export is to be written."""

    called: str
    """The path as it was given."""
    place: Path
    """The same from the root, however often the current directory changes."""


@dataclass(frozen=True)
class Exported:
    """The account of an export."""

    to: str
    """The target."""
    adapter: str
    base: str
    out: str
    dtype: str
    """Of what was written."""
    matrices: int
    """Matrices of the base that something is added to; each expert's count one by one."""
    rank_before: int
    """The largest rank in the adapter."""
    rank: int | None
    """The one rank of what was written; None where there are no factors any more."""
    files: tuple[str, ...]
    bytes: int
    notes: tuple[str, ...] = ()
    """Differences from what one would expect."""

    @classmethod
    def of(
        cls,
        to: str,
        deltas: AdapterOnModel,
        out: Out,
        *,
        dtype: torch.dtype | str,
        rank: int | None,
        files: Sequence[str],
        size: int,
        notes: Sequence[str],
    ) -> Exported:
        """The account of what was written, `size` bytes of tensors."""
        doubt = another_base(deltas.folder.config, deltas.base.label)
        return cls(
            to=to,
            adapter=deltas.folder.label,
            base=deltas.base.label,
            out=out.called,
            dtype=str(dtype).removeprefix("torch."),
            matrices=len(deltas.names),
            rank_before=deltas.rank,
            rank=rank,
            files=tuple(files),
            bytes=size,
            notes=(*notes, *([doubt] if doubt else [])),
        )

    def to_dict(self) -> dict[str, Any]:
        """The account as plain JSON values."""
        return {"format": 1, **asdict(self), "files": list(self.files), "notes": list(self.notes)}

    def table(self) -> str:
        """The account for a terminal."""
        rank = f" at rank {self.rank}" if self.rank is not None else ""
        before = f" (from {self.rank_before})" if self.rank not in (None, self.rank_before) else ""
        files = f"{len(self.files)} files" if len(self.files) > 1 else self.files[0]
        return "\n".join(
            [
                f"{self.matrices} matrices{rank}{before} in {self.dtype}: {size(self.bytes)}, {files}.",
                *(f"Note: {note}" for note in self.notes),
            ]
        )


def check_place(out: str | os.PathLike[str], *, force: bool, is_file: bool = False) -> None:
    """See before the work whether an export may be written there.

    With `force` it takes the place of an earlier export, and of nothing else: what else lies in its folder stays.

    Args:
        out: Where it is to be written.
        force: Whether something there may be replaced.
        is_file: Whether it will be a single file.

    Raises:
        AdapterError: Something is there that must not be replaced.
    """
    place = Path(out)
    if not check_free(place, is_file=is_file):
        return
    if not force:
        what = "" if is_file else " and is not empty"
        raise AdapterError(f"`{place}` exists{what}. Choose another name, or replace it with `{asked('force')}`.")
    if is_file:
        with place.open("rb") as file:
            start = file.read(1 << 16)
        if not ((start[:4] == b"GGUF" and _ADAPTER in start) or _EXPORTED.search(start)):
            raise AdapterError(f"`{place}` is no earlier export; `{asked('force')}` replaces nothing else.")
        return
    ours = files_of(place)
    if not ours:
        raise AdapterError(f"`{place}` is no earlier export; `{asked('force')}` replaces nothing else.")
    check_apart(place, (REPORT,), ours, (".safetensors", CONFIG))


def files_of(folder: Path) -> set[str]:
    """The files of an earlier export, as its report lists them; none where there is none."""
    try:
        listed = read_json(folder / REPORT)["files"]
        inside = [str(name) for name in listed if not {"..", ""} & {*str(name).split("/")}]
    except (ValueError, KeyError, TypeError):
        return set()
    return files_in(folder, [*inside, REPORT])


def write_report(folder: Path, exported: Exported) -> None:
    """Write the account beside what it is of."""
    text = json.dumps(exported.to_dict(), indent=2, sort_keys=True)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
