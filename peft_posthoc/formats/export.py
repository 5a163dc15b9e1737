"""Adapters in the forms of programs that do not read PEFT's: one file for each target, one line in a table.

A new target is one function `write(deltas, out, **Writing)` and a line in `TARGETS`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.adapters.writer import check_target
from peft_posthoc.formats.open import open_deltas
from peft_posthoc.formats.result import Exported, Out, check_place
from peft_posthoc.sources import Source, sides
from peft_posthoc.text import asked

To = Literal["gguf", "mlx", "diffusers", "comfyui", "kohya", "vllm-moe", "peft-moe", "merged"]


class Target(NamedTuple):
    """A form that an adapter can be written in."""

    module: str
    """The file that writes it, loaded when it is asked for."""
    function: str
    shape: Literal["file", "folder", "either", "adapter"]
    """What is written: a single file, a folder, one of them by its name, or an adapter folder in PEFT's own form."""
    values: bool = False
    """Whether it takes the base's weights, not only its configuration."""
    several: bool = False
    """Whether components of one pipeline can be in it together."""


TARGETS: dict[str, Target] = {
    "gguf": Target("peft_posthoc.formats.gguf", "write", "file"),
    "mlx": Target("peft_posthoc.formats.mlx", "write", "folder"),
    "diffusers": Target("peft_posthoc.formats.diffusers", "write", "either", several=True),
    "comfyui": Target("peft_posthoc.formats.comfyui", "write", "file", values=True, several=True),
    "kohya": Target("peft_posthoc.formats.kohya", "write", "file", several=True),
    "vllm-moe": Target("peft_posthoc.formats.experts", "write_per_expert", "adapter"),
    "peft-moe": Target("peft_posthoc.formats.experts", "write_stacked", "adapter"),
    "merged": Target("peft_posthoc.formats.merged", "write", "folder", values=True),
}

SAFETENSORS = ".safetensors"
Write = Callable[..., Exported]


def export(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: To,
    *,
    base: Source | None = None,
    base_revision: str | None = None,
    beside: Sequence[str | os.PathLike[str]] = (),
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: bool = False,
) -> Exported:
    """Write an adapter in another form, exactly: what it adds to every matrix stays the same, but for rounding.

    Args:
        adapter: Any PEFT LoRA folder, or a LoRA file of diffusers, ComfyUI or kohya's scripts.
        out: What to write: a file for `gguf`, `comfyui` and `kohya`, a folder for the others; for `diffusers` a file
            where it ends in `.safetensors`.
        to: `gguf` for llama.cpp and Ollama; `mlx` for MLX-LM; `diffusers` for its pipelines; `comfyui` for ComfyUI;
            `kohya` for A1111, Forge and kohya's scripts; `vllm-moe` and `peft-moe`
            for the experts of a mixture one by one, as serving engines read them, and stacked, as PEFT computes with
            them; `merged` for a full checkpoint of base + adapter.
        base: The model that the adapter is for: a folder, a hub id, or for `merged` anything that `extract` takes. By
            default what the adapter's configuration names. Only `merged` reads its weights.
        base_revision: Branch, tag or commit, where `base` is a hub id.
        beside: For `diffusers`, `comfyui` and `kohya`: adapters of other components of the same pipeline, which name
            their bases themselves, or `BASE+ADAPTER`.
        dtype: Of what is written; by default the adapter's, and for `merged` the base's, tensor by tensor.
        force: Replace an earlier export that is at `out`.
        progress: Show a progress bar on stderr.

    Raises:
        AdapterError: The adapter cannot be read, does not fit the base, or holds what the target has no place for;
            `out` is taken or cannot be written.
        CheckpointError: The base cannot be read.
        MissingExtraError: `gguf` is asked for, and the package is not installed.
        ValueError: An argument makes no sense.
    """
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"`export(dtype=...)` must be float32, bfloat16 or float16. Got {dtype}.")
    target = check_out(to, out, force=force)
    if beside and not target.several:
        raise ValueError(f"`export(beside=...)` goes with several components in one file, which {to!r} has not.")
    opened = [open_deltas(adapter, base, values=target.values, revision=base_revision)]
    opened += [_of_component(one, values=target.values) for one in beside]
    return write(opened, out, to, dtype=dtype, force=force, progress=progress)


def write(
    opened: Sequence[AdapterOnModel],
    out: str | os.PathLike[str],
    to: str,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: bool = False,
) -> Exported:
    """Write adapters that are open, of one component each, as in `export`."""
    target, place = TARGETS[to], Out(str(out), Path(out).absolute())
    function: Write = getattr(importlib.import_module(target.module), target.function)
    several = {"more": opened[1:]} if target.several else {}
    return function(opened[0], place, dtype=dtype, force=force, progress=progress, **several)


def check_out(to: str, out: str | os.PathLike[str], *, force: bool) -> Target:
    """See before the work whether a target may be written there.

    Raises:
        AdapterError: Something is there that must not be replaced.
        ValueError: There is no such target, or it is written under other names.
    """
    target = TARGETS.get(to)
    if target is None:
        raise ValueError(f"`{asked('to', None)}` must be one of {', '.join(TARGETS)}. Got {to!r}.")
    of_tensors = Path(out).suffix == SAFETENSORS
    is_file = target.shape == "file" or (target.shape == "either" and of_tensors)
    if target.several and is_file and not of_tensors:
        raise ValueError(f"`{asked('to', to)}` writes one file, NAME{SAFETENSORS}. Got {str(out)!r}.")
    if target.shape == "adapter":
        check_target(out, force=force)
    else:
        check_place(out, force=force, is_file=is_file)
    return target


def _of_component(adapter: str | os.PathLike[str], *, values: bool) -> AdapterOnModel:
    base, own = sides(str(adapter)) or (None, adapter)
    return open_deltas(own, base, values=values)
