"""Files of a model's folder: which hold its weights, and what its configuration says."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from peft_posthoc.errors import CheckpointError
from peft_posthoc.json_file import read_json

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE = "pytorch_model.bin"
# A diffusers component's; its variants (`.fp16.`, `.non_ema.`) lie beside it.
DIFFUSERS = "diffusion_pytorch_model"
# Of a diffusers pipeline, which is several models in folders of their own.
PIPELINE = "model_index.json"
# What a single file of weights may end in.
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def weight_files(names: Collection[str]) -> list[str]:
    """The files among `names` that hold the weights: an index alone, one file, or several files without an index.

    Safetensors come before pickles, and the usual names before others. A single file comes before an index, as in
    transformers: a folder that is saved into twice may keep the older form beside the newer one. A pipeline has none.
    """
    if PIPELINE in names:
        return []
    for usual in (SAFETENSORS, SAFETENSORS_INDEX, f"{DIFFUSERS}.safetensors", f"{DIFFUSERS}.safetensors.index.json"):
        if usual in names:
            return [usual]
    top = sorted(name for name in names if "/" not in name)
    indexes = [name for name in top if ".safetensors.index." in name and is_index(name)]
    if len(indexes) == 1:
        return indexes
    # `consolidated.safetensors` holds the same model under other names (Mistral's own format).
    others = [n for n in top if n.endswith(".safetensors") and not n.startswith(("adapter_", "consolidated"))]
    if others:
        return others
    for usual in (PICKLE, PICKLE_INDEX, f"{DIFFUSERS}.bin", f"{DIFFUSERS}.bin.index.json"):
        if usual in names:
            return [usual]
    return []


def is_index(name: str) -> bool:
    """Tell by its name whether a file is an index of shards; a variant's is `.safetensors.index.fp16.json`."""
    return ".index." in name and name.endswith(".json")


def no_weights(what: str, names: Collection[str], *, parts: Collection[str] = ()) -> str:
    """A sentence about a place that holds these files and no weights; `parts` of it are models."""
    if PIPELINE in names:
        choice = f": {', '.join(f'`{part}`' for part in parts)}" if parts else ", from a local folder"
        return f"{what} is a diffusers pipeline of several models; an adapter is for one. Give one of them{choice}."
    held = ", ".join(sorted(names)[:5]) or "nothing"
    return f"No weights in {what} (it holds {held}). Looked for {SAFETENSORS}, {PICKLE}, or an index of shards."


def shards_of(index: Path) -> dict[str, str]:
    """Tensor name to file name, as the index says. A shard must lie beside its index.

    Raises:
        CheckpointError: The index is no valid one, or names a file outside of its folder.
    """
    try:
        read = read_json(index, unique=True)
    except ValueError as error:
        raise CheckpointError(f"`{index}` is not a valid index of shards: {error}.") from error
    weight_map = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"`{index}` is not a valid index of shards: it has no object `weight_map`.")
    pairs = {tensor: str(file) for tensor, file in weight_map.items()}
    for tensor, file in pairs.items():
        if not is_plain_name(file):
            raise CheckpointError(
                f"`{index}` places `{tensor}` in `{file}`, which is not a file of its own folder. Refused: only files "
                "beside the index are read."
            )
    return pairs


def is_plain_name(name: str) -> bool:
    """Tell whether a name is one of a folder's own files or folders, by the rules of every system."""
    return PurePosixPath(name).name == name == PureWindowsPath(name).name and name not in ("", ".", "..")


def state_of(path: Path) -> tuple[int, int, int]:
    """Values that change when a file is replaced or written to."""
    return file_state(path.stat())


def file_state(found: os.stat_result) -> tuple[int, int, int]:
    """The same of a file that is open."""
    return found.st_ino, found.st_size, found.st_mtime_ns


def _special_float(read: dict[str, Any]) -> Any:
    """Infinity, as transformers 5 writes it: `{"__float__": "Infinity"}` (Mamba2's configuration has one)."""
    return float(read["__float__"]) if read.keys() == {"__float__"} else read


def home_of(folder: Path, parts: Path) -> Path:
    """The model's own folder, where what the user gave may be the one within it that holds its weights in parts."""
    return folder.absolute().parent if folder == parts and not (folder / "config.json").exists() else folder


def config_of(folder: Path) -> Mapping[str, Any] | None:
    """The model's configuration in a folder, if there is one.

    Raises:
        CheckpointError: The file cannot be read.
    """
    path = folder / "config.json"
    if not path.exists() or path.is_dir():
        return None
    try:
        config = read_json(path, hook=_special_float)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"`{path}` is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"`{path}` is not a configuration: expected a JSON object.")
    architectures, model_type = config.get("architectures") or [], config.get("model_type") or ""
    if not (isinstance(architectures, list) and all(isinstance(name, str) for name in [*architectures, model_type])):
        raise CheckpointError(f"`{path}` is not a configuration: `architectures` or `model_type` is no name.")
    for key in ("text_config", "quantization_config"):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"`{path}` is not a configuration: `{key}` is no object.")
    if not all(isinstance(part.get("vocab_size") or 0, int) for part in (config, config.get("text_config") or {})):
        raise CheckpointError(f"`{path}` is not a configuration: `vocab_size` is no whole number.")
    return config
