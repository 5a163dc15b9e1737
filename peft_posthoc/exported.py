"""What an export wrote, and where it may be written."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_posthoc.errors import AdapterError
from peft_posthoc.json_file import read_json
from peft_posthoc.peft_format import REPORT
from peft_posthoc.report import size

if TYPE_CHECKING:
    import torch

    from peft_posthoc.deltas import Deltas


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

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
    """What is other than one would expect."""

    @classmethod
    def of(
        cls,
        to: str,
        deltas: Deltas,
        out: str | os.PathLike[str],
        dtype: torch.dtype,
        rank: int,
        files: tuple[str, ...],
        count: int,
        notes: Sequence[str],
    ) -> Exported:
        """The account of factors that were written, `count` bytes of them."""
        return cls(
            to=to,
            adapter=deltas.folder.label,
            base=deltas.base.label,
            out=str(out),
            dtype=str(dtype).removeprefix("torch."),
            matrices=len(deltas.names),
            rank_before=deltas.rank,
            rank=rank,
            files=files,
            bytes=count,
            notes=tuple(notes),
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

    With `force` it takes the place of an earlier export, and of nothing else.

    Args:
        out: Where it is to be written.
        force: Whether something there may be replaced.
        is_file: Whether it will be a single file.

    Raises:
        AdapterError: Something is there that must not be replaced.
    """
    place = Path(out)
    above = next((path for path in place.parents if path.exists()), place.parent)
    if not above.is_dir():
        raise AdapterError(f"`{place}` cannot be made: `{above}` is not a folder.")
    if not place.exists() and not place.is_symlink():
        return
    if place.is_dir() == is_file:
        raise AdapterError(f"`{place}` exists and is {'' if is_file else 'not '}a folder.")
    if not is_file and not any(place.iterdir()):
        return
    if not force:
        what = "" if is_file else " and is not empty"
        raise AdapterError(f"`{place}` exists{what}. Choose another name, or replace it with `--force`.")
    if is_file:
        with place.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise AdapterError(f"`{place}` is no GGUF file; `--force` replaces nothing else.")
        return
    known = _files_of(place)
    others = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file() or path.is_symlink())
    if strangers := [name for name in others if name not in known]:
        raise AdapterError(
            f"`{place}` holds more than an export ({', '.join(strangers[:5])}); `--force` would delete it."
        )


def _files_of(folder: Path) -> Collection[str]:
    """The files of an earlier export, as its report lists them."""
    try:
        return {*read_json(folder / REPORT)["files"], REPORT}
    except (ValueError, KeyError, TypeError):
        return ()


def write_report(folder: Path, exported: Exported) -> None:
    """Write the account beside what it is of."""
    text = json.dumps(exported.to_dict(), indent=2, sort_keys=True)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
