"""PEFT's LoRA folder, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from peft_posthoc.adapters.card import CARD, REPORT, card, is_our_card
from peft_posthoc.adapters.config import CONFIG, PICKLE, WEIGHTS
from peft_posthoc.checkpoints.beside import text_files_in
from peft_posthoc.checkpoints.model_files import weight_files
from peft_posthoc.errors import AdapterError
from peft_posthoc.files import check_apart, check_free, files_in, staged
from peft_posthoc.json_file import read_json
from peft_posthoc.text import asked

_WRITTEN = (CONFIG, WEIGHTS, REPORT)
_BESIDE = "beside"  # in the report: what was copied beside the adapter
# What engines load with the adapter if it lies beside it.
_SPOIL = (".safetensors", "added_tokens.json")


class Contents(NamedTuple):
    """The contents of an adapter folder."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    report: Mapping[str, Any]
    provenance: Mapping[str, Any]
    beside: Mapping[str, Path] = MappingProxyType({})
    """By name: files that are copied into it."""


def check_target(folder: str | os.PathLike[str], *, force: bool = False) -> None:
    """See before the work whether an adapter may be written there.

    Raises:
        AdapterError: Something is there that must not be replaced, or that would spoil the adapter.
    """
    target = Path(folder)
    if not check_free(target):
        return
    if not force:
        raise AdapterError(
            f"`{target}` exists and is not empty. Choose another folder, or replace it with `{asked('force')}`."
        )
    if not (target / CONFIG).is_file():
        raise AdapterError(f"`{target}` is not an adapter folder; `{asked('force')}` replaces nothing else.")
    check_apart(target, _WRITTEN, adapter_files(target), _SPOIL)
    if model := weight_files({path.name for path in target.iterdir()}):
        raise AdapterError(
            f"`{target}` holds the weights of a model (`{model[0]}`), which would be loaded with the adapter on it. "
            "Choose another folder."
        )


def adapter_files(folder: Path) -> set[str]:
    """The files of an adapter that is there: what we or PEFT write, by name."""
    found = files_in(folder, (*_WRITTEN, PICKLE)) | copied(folder).keys()
    return found | {CARD} if is_our_card(folder / CARD) else found


def copied(folder: Path) -> dict[str, Path]:
    """What the report says was copied beside the adapter, of what could have been, by name."""
    try:
        report = read_json(folder / REPORT)
    except (OSError, ValueError):
        return {}
    listed = report.get(_BESIDE) if isinstance(report, dict) else None
    return {name: folder / name for name in text_files_in(folder) if name in listed} if isinstance(listed, list) else {}


def write_folder(
    folder: str | os.PathLike[str],
    contents: Contents,
    *,
    force: bool = False,
    called: str | os.PathLike[str] | None = None,
) -> None:
    """Write an adapter folder: all of it, with a model card, or nothing. A card that is not ours stays.

    Args:
        folder: A folder that does not exist yet, or is empty.
        contents: What goes into it.
        force: Replace an adapter that is there. What else lies in its folder stays.
        called: What messages call the folder, where that is not its path.

    Raises:
        AdapterError: The folder holds something, or cannot be written.
    """
    place = Path(folder).absolute()
    check_target(place, force=force)
    ours = adapter_files(place) if place.is_dir() else ()
    with staged(place, what="The adapter", called=called or folder, force=force, ours=ours) as made:
        made.mkdir()
        save_file(dict(contents.tensors), made / WEIGHTS, metadata=metadata(contents.provenance))
        sort_metadata(made / WEIGHTS)
        _write_json(made / CONFIG, contents.config)
        copied = {_BESIDE: sorted(contents.beside)} if contents.beside else {}
        _write_json(made / REPORT, {**contents.report, **copied})
        if CARD in ours or not os.path.lexists(place / CARD):
            told = {"provenance": contents.provenance, **contents.report}
            (made / CARD).write_text(card(contents.config, told), encoding="utf-8")
        for name, path in contents.beside.items():
            (made / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, made / name)
        # safetensors makes files that only their owner can read; servers often run as somebody else.
        (made / WEIGHTS).chmod((made / CONFIG).stat().st_mode)


def metadata(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Metadata for the header of the file with the weights."""
    return {"format": "pt", "phlora": json.dumps(provenance, sort_keys=True)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise AdapterError(
            f"`{path.name}` would hold NaN or an infinity, which JSON has no word for. Mend the configuration that it "
            "is from."
        ) from error
    path.write_text(text + "\n", encoding="utf-8")


def sort_metadata(path: Path) -> None:
    """Make the file's header deterministic: safetensors writes the metadata's keys in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise AdapterError(f"The header of `{path}` has an unknown form.")
        file.seek(8)
        file.write(text.ljust(length))
