"""A quantised checkpoint, seen as the weights that it stands for: each is decoded when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, place_of
from peft_posthoc.checkpoints.quantized import awq, bitsandbytes, comfyui, compressed, fp4, gptq, scaled
from peft_posthoc.checkpoints.quantized.coded import Coded, Reader, Stored
from peft_posthoc.checkpoints.quantized.scaled import FLOATS
from peft_posthoc.checkpoints.quantized.steps import steps
from peft_posthoc.checkpoints.quantized.undecoded import quantized
from peft_posthoc.checkpoints.view import Piece, View, same
from peft_posthoc.errors import CheckpointError, PosthocError, one_line
from peft_posthoc.json_file import read_json

# In this order each finds its own among what the ones before it left.
READERS: tuple[Reader, ...] = (
    comfyui.weights,
    fp4.weights,
    scaled.weights,
    compressed.weights,
    gptq.weights,
    awq.weights,
    bitsandbytes.weights,
)

# What says that weights were rotated: by compressed-tensors, and by GPTQModel.
_ROTATED = ("transform_config", "rotation")
# What a model of several parts calls the configuration of its text.
_TEXT = ("text_config", "llm_config", "language_config")
# Scales of what attention computes and keeps (compressed-tensors, ModelOpt, Quark), which are no weights.
_OF_CACHE = ("k_scale", "v_scale", "q_scale", "prob_output_scale", "output_scale")


class Decoded(View):
    """A checkpoint of which some weights are decoded; all others are as they are stored."""

    handed = True

    def __init__(self, checkpoint: Checkpoint, coded: dict[str, Coded], *, method: str) -> None:
        """Show what is decoded in place of what it is made of.

        Args:
            checkpoint: As it is stored.
            coded: By name, what is decoded.
            method: By what it was quantised, as its configuration says.
        """
        gone = {name for one in coded.values() for name in (*one.sources, *one.beside)}
        self.coded: Mapping[str, Coded] = coded
        self._method = method
        gone |= {name for name in checkpoint.headers if name.rpartition(".")[2] in _OF_CACHE}
        pieces = {name: same(checkpoint, name) for name in checkpoint.headers if name not in gone}
        pieces |= {name: Piece(one.sources, one.header, one.make) for name, one in coded.items()}
        super().__init__(checkpoint, pieces, module=checkpoint.module)

    def read(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            CheckpointError: It is stored as codes that do not fit what lies beside them.
        """
        if name not in self.coded:
            return super().read(name)
        try:
            found = super().read(name)
        except PosthocError:
            raise
        except Exception as error:  # What a damaged file holds makes each library fail in its own way.
            raise CheckpointError(f"`{name}` of `{self.label}` cannot be decoded: {one_line(error)}") from error
        if (tuple(found.shape), found.dtype) != self.headers[name]:
            raise CheckpointError(
                f"`{name}` of `{self.label}` is decoded to {tuple(found.shape)}, {found.dtype}; what lies beside its "
                f"codes says {self.headers[name].shape}, {self.headers[name].dtype}."
            )
        return found

    def steps(self, name: str) -> Tensor | None:
        """The grid's step at each value of a decoded weight."""
        one = self.coded.get(name)
        if one is None:
            return super().steps(name)
        codes, *beside = map(self._source, one.sources)
        return steps(lambda moved: one.make(moved, *beside), codes, one.bits, along=one.along)

    def coded_as(self, name: str) -> str | None:
        """The format of a weight that is decoded."""
        one = self.coded.get(name)
        return super().coded_as(name) if one is None else ", ".join(filter(None, (self._method, one.format)))


def decoded(checkpoint: Checkpoint, beside: Path | None = None) -> Checkpoint:
    """The checkpoint with its quantised weights decoded; itself, where it has none that a reader knows.

    Args:
        checkpoint: As it is stored.
        beside: The folder that it is in, which may have `hf_quant_config.json` or another file that tells; by default
            the checkpoint's own.

    Raises:
        CheckpointError: What is stored fits no weight.
    """
    if not quantized(checkpoint):
        return checkpoint
    stored = Stored(checkpoint, _told(checkpoint, beside or place_of(checkpoint)), _dtype_of_model(checkpoint))
    coded: dict[str, Coded] = {}
    for reader in READERS:
        gone = {name for one in coded.values() for name in (*one.sources, *one.beside)}
        try:
            coded |= dict(reader(replace(stored, taken=gone)))
        except PosthocError:
            raise
        except Exception as error:  # A configuration may hold anything.
            raise CheckpointError(
                f"What says how `{checkpoint.label}` is quantised is not understood: {one_line(error)}"
            ) from error
    coded = coded or dict(scaled.as_they_are(stored))
    if not coded:
        return checkpoint
    _refuse_rotated(stored)
    coded = {name: _with_smoothing(stored, name, one) for name, one in coded.items()}
    view = Decoded(checkpoint, coded, method=stored.method)
    _refuse_incomplete(view)
    return view


def _with_smoothing(stored: Stored, name: str, one: Coded) -> Coded:
    """The weight times what the layer's input is multiplied by (ModelOpt, ComfyUI), where that is stored beside it.

    Raises:
        CheckpointError: It is not for the in features of a linear layer.
    """
    factor = replace(stored, taken=()).beside(name, "pre_quant_scale")
    if factor is None or name.rpartition(".")[2] != "weight":
        return one
    shape = stored.checkpoint.headers[factor].shape
    if torch.Size(shape).numel() != one.header.shape[-1] or len(one.header.shape) != 2:
        raise CheckpointError(f"`{factor}` is {shape}; it scales no columns of `{name}` ({one.header.shape}).")

    def make(*tensors: Tensor) -> Tensor:
        made = one.make(*tensors[:-1])
        return (made * tensors[-1].to(torch.float32).flatten()).to(made.dtype)

    return one._replace(sources=(*one.sources, factor), make=make)


def _refuse_rotated(stored: Stored) -> None:
    """See that codes stand for the model's own weights, and not for those in another basis.

    Raises:
        CheckpointError: Something says that they were rotated.
    """
    for key in _ROTATED:
        told = stored.told.get(key)
        if told and (not isinstance(told, Mapping) or told.get("config_groups", told)):
            raise CheckpointError(
                f"`{stored.checkpoint.label}` holds weights that were rotated before they were quantised (`{key}`), "
                "which is not undone here. Give the model that it was made from."
            )


def _refuse_incomplete(view: Decoded) -> None:
    """See that no codes are left over where others of their form are decoded: a scale of theirs is missing.

    Raises:
        CheckpointError: There are some.
    """
    codes = {
        (one.sources[0].rpartition(".")[2], view.seen.headers[one.sources[0]].dtype) for one in view.coded.values()
    }
    floats = any(dtype in FLOATS for _, dtype in codes)
    for name, header in view.headers.items():
        leaf = name.rpartition(".")[2]
        if (leaf, header.dtype) in codes or (floats and header.dtype in FLOATS and "scale" not in leaf):
            module = name.rpartition(".")[0]
            scaled_so = any(f"{module}.{own}" in view.headers for own in ("weight_scale", "weight_scale_inv", "scales"))
            raise CheckpointError(
                f"`{name}` of `{view.label}` holds codes ({str(header.dtype).removeprefix('torch.')}) "
                + (
                    f"as {list(header.shape)}, a form that is not read. Give the model that it was made from."
                    if scaled_so
                    else "and lacks the scales that others have beside them. Fetch the checkpoint again, or convert it "
                    "again."
                )
            )


def _dtype_of_model(checkpoint: Checkpoint) -> torch.dtype:
    """The type that the model computes in, as its configuration says; bfloat16 where it does not."""
    told = next((one for own in _configs(checkpoint) if (one := own.get("dtype") or own.get("torch_dtype"))), None)
    named = getattr(torch, str(told).removeprefix("torch."), None)
    if isinstance(named, torch.dtype) and named.is_floating_point and named.itemsize >= 2:
        return named
    return torch.bfloat16


def _configs(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The configuration of a model, and that of its text, where it has one of its own."""
    config = dict(checkpoint.config or {})
    return [config, *(dict(own) for key in _TEXT if isinstance(own := config.get(key), Mapping))]


def _told(checkpoint: Checkpoint, beside: Path | None) -> dict[str, Any]:
    """What says how the weights are stored, wherever it stands."""
    # Of a model of several parts, that of the text (Kimi); and by its name in older files of compressed-tensors.
    for config in _configs(checkpoint):
        told = config.get("quantization_config") or config.get("compression_config")
        if isinstance(told, dict):
            return _as_packed(told)
    if "_quantization_metadata" in checkpoint.metadata:
        try:
            said = json.loads(checkpoint.metadata["_quantization_metadata"])
        except ValueError as error:
            raise CheckpointError(f"`_quantization_metadata` of `{checkpoint.label}` is no JSON: {error}.") from error
        return {"quant_method": "ComfyUI", **(said if isinstance(said, dict) else {})}
    for name, told_in in _FILES.items():
        file = None if beside is None else beside / name
        if file is not None and file.is_file():
            try:
                read = read_json(file)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"`{file}` cannot be read: {error}.") from error
            return told_in(read) if isinstance(read, dict) else {}
    return {}


def _as_packed(told: dict[str, Any]) -> dict[str, Any]:
    """The same, with the method whose form AutoRound packed in."""
    form = str(told.get("packing_format") or "").removeprefix("auto_round:").removeprefix("auto_")
    packed = form in ("gptq", "awq") and "round" in str(told.get("quant_method"))
    return {**told, "quant_method": form} if packed else told


def _of_modelopt(read: dict[str, Any]) -> dict[str, Any]:
    inner = read.get("quantization")
    return {"quant_method": "modelopt", **inner} if isinstance(inner, dict) else {}


def _of_gptq(read: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "gptq", **read}


def _of_awq(read: dict[str, Any]) -> dict[str, Any]:
    own = {"bits": read.get("w_bit"), "group_size": read.get("q_group_size")}
    return {"quant_method": "awq", **own, **read}


# The libraries' own files beside a checkpoint whose configuration says nothing.
_FILES = {"hf_quant_config.json": _of_modelopt, "quantize_config.json": _of_gptq, "quant_config.json": _of_awq}
