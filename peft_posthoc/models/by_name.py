"""The layout of a model that has no known class: guessed from names and shapes."""

from __future__ import annotations

from collections.abc import Mapping

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.models.kinds import EMBEDDING, LINEAR, LayerKind
from peft_posthoc.models.layout import GUESSED, Layout, is_of_an_expert

_TOKEN_LEAVES = ("embed_tokens", "word_embeddings", "wte", "shared", "tok_embeddings", "token_embedding", "embed_in")
_POSITION_LEAVES = ("wpe", "position_embeddings", "token_type_embeddings", "embed_positions", "relative_attention_bias")
_EMBEDDING_LEAVES = _TOKEN_LEAVES + _POSITION_LEAVES
# Routers beside experts, which are no plain layers.
_ROUTER_LEAVES = ("gate", "router")
_HEAD_LEAVES = ("lm_head", "embed_out")
# GPT-2's names, whose weights are stored in x out in some models and out x in in others: a guess could be wrong.
_UNKNOWABLE_LEAVES = ("c_attn", "c_proj", "c_fc")


def of_names(checkpoint: Checkpoint) -> Layout:
    """The layout that names and shapes suggest."""
    kinds: dict[str, LayerKind] = {}
    unknowable = (*_UNKNOWABLE_LEAVES, *(_ROUTER_LEAVES if any(map(is_of_an_expert, checkpoint.headers)) else ()))
    for name, header in checkpoint.headers.items():
        module, _, leaf = name.rpartition(".")
        name = module.rpartition(".")[2]
        if leaf == "weight" and len(header.shape) == 2 and name not in unknowable:
            kinds[module] = EMBEDDING if name in _EMBEDDING_LEAVES else LINEAR
    tokens = next((module for module in kinds if module.rpartition(".")[2] in _TOKEN_LEAVES), None)
    return Layout(
        origin=GUESSED,
        kinds=kinds,
        classes=dict.fromkeys((module for name in checkpoint.headers for module in _around(name)), ""),
        head=_head(checkpoint, kinds, tokens),
        tokens=tokens,
    )


def _head(checkpoint: Checkpoint, kinds: Mapping[str, LayerKind], tokens: str | None) -> str | None:
    """The head: by its name, or as the matrix beside the layers that leads to as many tokens as are embedded."""
    if named := [module for module in kinds if module.rpartition(".")[2] in _HEAD_LEAVES]:
        return named[0]
    rows = checkpoint.headers[f"{tokens}.weight"].shape[0] if tokens else (checkpoint.config or {}).get("vocab_size")
    beside = (m for m, kind in kinds.items() if kind is LINEAR and not any(part.isdecimal() for part in m.split(".")))
    return next((module for module in beside if checkpoint.headers[f"{module}.weight"].shape[0] == rows), None)


def _around(weight: str) -> list[str]:
    """The module of a weight, and those that it lies in: PEFT takes a name to mean these too."""
    parts = weight.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))] or [""]
