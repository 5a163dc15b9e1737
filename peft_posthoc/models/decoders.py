"""The layout of common decoders, without their class, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.models.config import architecture
from peft_posthoc.models.kinds import EMBEDDING, LINEAR
from peft_posthoc.models.layout import Layout

# Decoders whose every matrix is a Linear, but for `model.embed_tokens`; and whether they tie `lm_head` to it when their
# configuration does not say so. A test holds each against its class in transformers.
PLAIN_DECODERS: Mapping[str, bool] = {
    "cohere": True,
    "gemma": True,
    "gemma2": True,
    "gemma3_text": True,
    "glm": False,
    "glm4": False,
    "granite": False,
    "llama": False,
    "mistral": False,
    "olmo": False,
    "olmo2": False,
    "phi": False,
    "phi3": False,
    "qwen2": False,
    "qwen3": False,
    "smollm3": True,
    "stablelm": False,
    "starcoder2": True,
}


def is_plain_decoder(checkpoint: Checkpoint) -> bool:
    """Tell whether a checkpoint on disk is one of `PLAIN_DECODERS`."""
    config = checkpoint.config or {}
    plain = config.get("model_type") in PLAIN_DECODERS and architecture(config).endswith("ForCausalLM")
    return plain and "model.embed_tokens.weight" in checkpoint.headers and checkpoint.module is None


def of_plain_decoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Layout:
    """The layout of a decoder of `PLAIN_DECODERS`."""
    matrices = {name.removesuffix(".weight") for name, header in checkpoint.headers.items() if len(header.shape) == 2}
    kinds = {module: EMBEDDING if module == "model.embed_tokens" else LINEAR for module in matrices}
    tied = bool(config.get("tie_word_embeddings", PLAIN_DECODERS[str(config["model_type"])]))
    kinds["lm_head"] = LINEAR
    return Layout(
        origin=architecture(config),
        kinds=kinds,
        classes=dict.fromkeys([*(name.rpartition(".")[0] for name in checkpoint.headers), "lm_head"], ""),
        head="lm_head",
        tokens="model.embed_tokens",
        ties={"model.embed_tokens": ("lm_head",)} if tied else {},
        task_type="CAUSAL_LM",
    )
