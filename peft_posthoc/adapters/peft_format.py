"""PEFT's LoRA folder: its file names, tensor names and scale, written whole or not at all, and read back to factors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_posthoc.adapters.config import CONFIG, by_pattern, read_config
from peft_posthoc.adapters.factors import Factors
from peft_posthoc.adapters.plain import not_plain
from peft_posthoc.checkpoints.files import weight_files
from peft_posthoc.errors import AdapterError
from peft_posthoc.files import check_apart, check_free, files_in, regular, staged
from peft_posthoc.models.kinds import FILED, LayerKind
from peft_posthoc.text import asked

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
REPORT = "phlora_report.json"
_BIAS = "lora_B.bias"
_WRITTEN = (CONFIG, WEIGHTS, REPORT)
_CARD = "README.md"
CARD_MARK = "<!-- Made with the adapter by phlora, and replaced with it. -->"
"""In every model card of ours: a card without it is somebody else's."""
# What engines load with the adapter if it lies beside it.
_SPOIL = (".safetensors", "added_tokens.json")


class Contents(NamedTuple):
    """What goes into an adapter folder."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    report: Mapping[str, Any]
    provenance: Mapping[str, Any]


class Stored(NamedTuple):
    """What an adapter folder holds."""

    factors: Mapping[str, Factors]
    """By module."""
    biases: Mapping[str, Tensor]
    """By module, what is added to its bias: LoRA's, its scale folded in."""
    whole: Mapping[str, Tensor]
    """By the model's name, what takes the place of the base's tensor (`modules_to_save`)."""
    stacked: Mapping[str, Factors]
    """By the module that holds them in the file, the factors of stacked experts, packed and without their scale."""
    target_parameters: tuple[str, ...]
    """The ends of the names of the parameters that these belong to."""
    scale: Scale


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
    found = files_in(folder, (*_WRITTEN, "adapter_model.bin"))
    try:
        ours = CARD_MARK in regular(folder / _CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    return found | {_CARD} if ours else found


def write_folder(
    folder: str | os.PathLike[str],
    contents: Contents,
    *,
    force: bool = False,
    called: str | os.PathLike[str] | None = None,
) -> None:
    """Write an adapter folder: all of it, or nothing.

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
        _sort_metadata(made / WEIGHTS)
        _write_json(made / CONFIG, contents.config)
        _write_json(made / REPORT, contents.report)
        # safetensors makes files that only their owner can read; servers often run as somebody else.
        (made / WEIGHTS).chmod((made / CONFIG).stat().st_mode)


def metadata(provenance: Mapping[str, Any]) -> dict[str, str]:
    """What the file with the weights says of itself in its header."""
    return {"format": "pt", "phlora": json.dumps(provenance, sort_keys=True)}


def read_folder(folder: str | os.PathLike[str]) -> Stored:
    """Read any PEFT LoRA folder.

    Raises:
        AdapterError: The folder is no LoRA adapter, or one that this reader does not know how PEFT computes with.
    """
    where = Path(folder)
    try:
        config = read_config(where)
        if why := not_plain(config):
            raise ValueError(why)
        scale = Scale(config, where)
        tensors = load_file(regular(where / WEIGHTS))
    except KeyError as error:
        raise AdapterError(f"`{where}` is not a readable LoRA adapter: its configuration has no {error}.") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"`{where}` is not a readable LoRA adapter: {error}.") from error
    factors: dict[str, Factors] = {}
    biases: dict[str, Tensor] = {}
    stacked: dict[str, Factors] = {}
    parameters = tuple(config.get("target_parameters") or ())
    # Of a parameter without a dot: of the model itself, which holds no stacks.
    stacks = tuple(f".{parameter.rpartition('.')[0]}" for parameter in parameters if "." in parameter)
    pairs = {stem: kind for kind in FILED for stem in _stems(tensors, kind)}
    modules = {stem: stem.removeprefix(PREFIX).removesuffix(".") for stem in pairs}
    alphas = scale.alphas(modules.values())
    for stem, kind in pairs.items():
        module = modules[stem]
        if f"{stem}{kind.b_key}" not in tensors:
            raise AdapterError(f"`{where}` holds `{stem}{kind.a_key}` without `{stem}{kind.b_key}`.")
        stored = tensors.pop(f"{stem}{kind.a_key}"), tensors.pop(f"{stem}{kind.b_key}")
        _check_factors(where, module, *stored)
        a, b = kind.factors(*stored)
        if f".{module.replace('.base_layer', '')}".endswith(stacks):
            stacked[module] = Factors(a.float(), b.float())
            continue
        # In float64, as `LoraFolder` does it: `BASE+ADAPTER` is, bit for bit, what `export --to merged` writes.
        factors[module] = Factors(a.float(), (b.double() * scale.of(alphas[module], len(a))).float())
        bias = tensors.pop(f"{stem}{_BIAS}", None)
        if bias is not None:
            biases[module] = bias.float() * scale.of(alphas[module], len(a))
    whole = {_own(name): tensor for name, tensor in tensors.items() if _is_whole(name, config)}
    strangers = sorted(name for name in tensors if _own(name) not in whole)
    if strangers or not (factors or stacked):
        names = ", ".join(strangers[:5]) or "nothing else"
        raise AdapterError(f"`{where}` holds tensors that are no LoRA factors: {names}.")
    return Stored(factors, biases, whole, stacked, parameters, scale)


def _stems(names: Iterable[str], kind: LayerKind) -> list[str]:
    """What the names of factors of this kind begin with."""
    return [name.removesuffix(kind.a_key) for name in names if name.endswith(f".{kind.a_key}")]


def _check_factors(where: Path, module: str, a: Tensor, b: Tensor) -> None:
    """See that the product of the two is a matrix.

    Raises:
        AdapterError: It is none.
    """
    if not (a.is_floating_point() and b.is_floating_point()):
        raise AdapterError(f"The factors of `{module}` in `{where}` are {a.dtype} and {b.dtype}, no real numbers.")
    if a.ndim < 2 or b.ndim != a.ndim or a.shape[0] != b.shape[1] or not (a.numel() and b.numel()):
        raise AdapterError(f"The factors of `{module}` in `{where}` do not fit: {list(b.shape)} and {list(a.shape)}.")


class Scale:
    """What PEFT multiplies a module's factors with.

    Args:
        config: Of the adapter.
        where: Its folder.

    Raises:
        KeyError: There is no `lora_alpha` in it.
    """

    def __init__(self, config: Mapping[str, Any], where: Path) -> None:
        self._config, self._where = config, where
        self._alpha = float(config["lora_alpha"])

    def alphas(self, modules: Iterable[str]) -> dict[str, float]:
        """By module, its `lora_alpha`.

        Raises:
            AdapterError: A pattern takes too long.
        """
        names = list(modules)
        own = by_pattern(self._config, "alpha_pattern", names, self._where)
        return {name: float(own.get(name, self._alpha)) for name in names}

    def of(self, alpha: float, rank: int) -> float:
        """What the product of factors of that rank is multiplied with."""
        return float(alpha / (rank**0.5 if self._config.get("use_rslora") else rank))


# The modules whose weights PEFT saves unasked, as it thinks that the vocabulary was changed.
_VOCABULARY = ("embed_tokens", "lm_head")


def _own(name: str) -> str:
    """What the model itself calls a tensor of the file."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _is_whole(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor takes the place of the base's.

    It lies in a module that PEFT takes to be kept whole, by the end of its name; or it is what PEFT saves beside
    factors: embeddings, and all biases where the configuration says so.
    """
    ends = tuple(config.get("modules_to_save") or ())
    parts = name.removeprefix(PREFIX).split(".")
    if any(".".join(parts[:depth]).endswith(ends) for depth in range(1, len(parts))):
        return True
    if parts[-1] == "bias":
        return config.get("bias", "none") != "none" and "lora_" not in name
    return parts[-1] == "weight" and len(parts) > 1 and (parts[-2] == "base_layer" or parts[-2] in _VOCABULARY)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def _sort_metadata(path: Path) -> None:
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
