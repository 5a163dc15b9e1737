"""A GGUF file as transformers has its model: the configuration, the names, and the values in the model's order.

The configuration is what transformers makes of the file's metadata; the names are those of the model that it builds
from it, each found in the file by the `gguf` package's own map. Nothing is matched by a guess: what has no place, or
another shape than the model's, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.gguf import Gguf
from peft_posthoc.checkpoints.view import Piece, View, same
from peft_posthoc.errors import CheckpointError
from peft_posthoc.models.by_class import build
from peft_posthoc.models.gguf_config import configuration_of


class Values(NamedTuple):
    """What llama.cpp's converter does to the values of an architecture's tensors, beside giving them other names."""

    interleaved: bool = False
    """The rows of queries and keys are in the order of its rotary embedding."""
    transposed: tuple[str, ...] = ()
    """These are out x in features, and in x out in the model."""
    norms_plus_one: bool = False
    """Norms have the one that the model adds when it runs."""
    experts_turned: bool = False
    """Experts are out x in features, gate and up apart; in the model in x out, and rows of gate and up by turns."""
    grouped: bool = False
    """Queries, keys and values are one matrix, in this order; in the model those of each group of heads follow."""


# By `general.architecture`. Each was held against llama.cpp's converter; of any other it is not known.
ARCHITECTURES: Mapping[str, Values] = {
    "bloom": Values(grouped=True),
    "falcon": Values(grouped=True),
    "gemma2": Values(norms_plus_one=True),
    "gemma3": Values(norms_plus_one=True),
    "gpt-oss": Values(experts_turned=True),
    "gpt2": Values(transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
    "llama": Values(interleaved=True),  # Mistral and Mixtral too
    "nemotron": Values(norms_plus_one=True),
    "phi3": Values(),
    "qwen2": Values(),
    "qwen2moe": Values(),
    "qwen3": Values(),
    "qwen3moe": Values(),
    "starcoder2": Values(),
}
# The rotary embedding's, which the configuration has.
_OF_CONFIGURATION = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight")


class OfGguf(View):
    """The model in a GGUF file."""

    handed = True
    seen: Gguf


def as_model_of_gguf(file: Gguf) -> OfGguf:
    """The file under the names, and in the order of rows, that its model has in transformers.

    Raises:
        CheckpointError: It is of an architecture that is not known here, or does not fit the model of its metadata.
    """
    kind = str(file.metadata.get("general.type") or "model")
    if kind != "model":
        raise CheckpointError(f"`{file.label}` is no model: by its own word it is of type `{kind}`.")
    if file.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"`{file.label}` is a GGUF of the architecture `{file.architecture}`; how its tensors differ from the "
            f"model's own is not known here. Known are {', '.join(ARCHITECTURES)}. Give the model in safetensors."
        )
    file.config = config = configuration_of(file)
    model = build(config)
    if model is None:
        raise CheckpointError(f"`{file.label}`: the installed transformers has no {config['architectures'][0]}.")
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    pieces = _pieces(file, own, config)
    used = {source for piece in pieces.values() for source in piece.sources}
    left = [name for name in file.headers if name not in used and not _OF_CONFIGURATION.fullmatch(name)]
    # By these, activations are quantised; they stay for the report.
    if strange := [name for name in left if not name.endswith(".input_scale")]:
        raise CheckpointError(
            f"`{file.label}` holds `{strange[0]}`, for which a {config['architectures'][0]} has no place."
        )
    return OfGguf(file, {**pieces, **{name: same(file, name) for name in left}})


def _pieces(file: Gguf, own: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, Piece]:
    """By the model's name, what each of its parameters is made of."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[file.architecture], int(file.metadata[f"{file.architecture}.block_count"]))

    def stored(name: str) -> str:
        # A stack of experts is a parameter itself, and its bias; their names in the file end as others do.
        name = f"{name.removesuffix('_bias')}.bias" if name.endswith("_bias") else name
        module, _, leaf = name.rpartition(".")
        leaf = f".{leaf}" if leaf in ("weight", "bias") else ""
        own = module if leaf else name
        return f"{names.get_name(own) or names.get_name(own.removeprefix('transformer.'))}{leaf or '.weight'}"

    found = {}
    for name, shape in own.items():
        sources = [stored(name)]
        if sources[0] not in file.headers and name.endswith((".gate_up_proj", ".gate_up_proj_bias")):
            sources = [stored(name.replace("gate_up_proj", half)) for half in ("gate_proj", "up_proj")]
        if missing := [source for source in sources if source not in file.headers]:
            raise CheckpointError(
                f"`{file.label}` holds no `{missing[0]}`, of which `{name}` of a {config['architectures'][0]} is made."
            )
        found[name] = _piece(file, sources, name, shape, config)
    return found


def _piece(file: Gguf, sources: list[str], name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Piece:
    values, leaf = ARCHITECTURES[file.architecture], sources[0].split(".")[-2]
    changes: list[Callable[[Tensor], Tensor]] = []
    if values.interleaved and leaf in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if leaf == "attn_q" else "num_key_value_heads"]
        changes.append(partial(in_halves, heads=int(heads)))
    if leaf in values.transposed and len(shape) == 2:
        changes.append(_transposed)
    if values.norms_plus_one and sources[0].endswith("norm.weight"):
        changes.append(_minus_one)
    if values.experts_turned and len(shape) == 3:
        changes.append(_transposed)
    if values.grouped and leaf == "attn_qkv":
        heads = int(config.get("num_attention_heads") or config["n_head"])
        changes.append(partial(in_groups, heads=heads, groups=int(config.get("num_kv_heads") or heads)))
    make = partial(_made, shape=shape, changes=changes, by_turns=values.experts_turned and ".gate_up_proj" in name)
    stored = [file.headers[source] for source in sources]
    try:
        made = make(*(torch.empty(one.shape, dtype=one.dtype, device="meta") for one in stored))
    except (RuntimeError, ValueError) as error:
        found = " and ".join(str(list(one.shape)) for one in stored)
        raise CheckpointError(
            f"`{file.label}` holds `{sources[0]}` as {found}; `{name}` of a {config['architectures'][0]} with its "
            f"metadata is {list(shape)}."
        ) from error
    return Piece(tuple(sources), Header(tuple(made.shape), made.dtype), make)


def _made(
    *tensors: Tensor, shape: tuple[int, ...], changes: list[Callable[[Tensor], Tensor]], by_turns: bool
) -> Tensor:
    """A parameter of a model, of what the file has of it."""
    # Gate above up, or a row of each by turns.
    made = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1 if by_turns else -2)
    if by_turns:
        made = torch.stack(made.chunk(2, 1), 2).flatten(1, 2)
    for change in changes:
        made = change(made)
    if [side for side in made.shape if side != 1] != [side for side in shape if side != 1]:
        raise ValueError(f"It is {list(made.shape)}, not {list(shape)}.")
    return made.view(shape) if made.dim() != len(shape) else made  # The file may lack sides of length one.


def in_halves(rows: Tensor, *, heads: int) -> Tensor:
    """The rows of each head in transformers' order, of llama.cpp's: the first half's before the second half's."""
    pairs: Tensor = rows.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def in_groups(rows: Tensor, *, heads: int, groups: int) -> Tensor:
    """For each group its heads' queries, then its keys, then its values; of all queries, all keys, all values."""
    width = len(rows) // (heads + 2 * groups)
    parts = rows.split([heads * width, groups * width, groups * width])
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.mT


def _minus_one(norm: Tensor) -> Tensor:
    return norm.float() - 1
