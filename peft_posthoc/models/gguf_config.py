"""The configuration of a model in a GGUF file: what transformers makes of the metadata, and what it leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from peft_posthoc.checkpoints.gguf import Gguf
from peft_posthoc.checkpoints.gguf_header import header_alone
from peft_posthoc.errors import CheckpointError

# What the metadata says and transformers leaves at the class's own value, by the configuration's name of it.
_METADATA = {
    "head_dim": "attention.key_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# What transformers fails on (5.23: it takes the length of a name for its value); the rotary embedding is put in below.
_MISREAD = ("gpt-oss.rope.scaling.",)
# Gemma 2 and 3 of 27B, by llama.cpp told from their layers, scale attention by another width than their heads'.
_LAYERS_OF_27B = (46, 62)


def configuration_of(file: Gguf) -> dict[str, Any]:
    """The configuration of a file's model, as `config.json` would have it.

    Raises:
        CheckpointError: transformers makes none of the metadata, or the rotary embedding is none that it has.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.utils import logging

    before = logging.get_verbosity()
    # Without the list of tokens it warns of an empty vocabulary, which is put right below.
    logging.set_verbosity_error()
    try:
        with header_alone(file.files[0], but=_MISREAD) as (short, _):
            read = AutoConfig.from_pretrained(
                short.parent, gguf_file=short.name, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        # Of metadata that it does not expect it makes errors of every kind.
        raise CheckpointError(
            f"transformers makes no configuration of `{file.label}`: {type(error).__name__}: {error}"
        ) from error
    finally:
        logging.set_verbosity(before)
    config = {key: _short(value) for key, value in read.to_dict().items() if not key.startswith("_")}
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(read)].__name__]

    def said(key: str) -> Any:
        return _short(file.metadata.get(f"{file.architecture}.{key}"))

    config |= {key: said(own) for key, own in _METADATA.items() if key in config and said(own) is not None}
    if file.architecture == "gpt-oss":
        own = {"sliding_window": "attention.sliding_window", "intermediate_size": "expert_feed_forward_length"}
        config |= {key: said(name) for key, name in own.items() if said(name)}
    if file.architecture == "falcon":
        groups = said("attention.head_count_kv") or 1
        config |= {"num_kv_heads": groups, "multi_query": groups == 1, "new_decoder_architecture": groups > 1}
        config["num_ln_in_parallel_attn"] = 2 if "blk.0.attn_norm_2.weight" in file.headers else 1
    if said("attention.layer_norm_epsilon") is not None and "layer_norm_epsilon" in config:
        config["layer_norm_epsilon"] = said("attention.layer_norm_epsilon")
    # Tensors are the surest word: of a file in parts, transformers sees one part.
    config["tie_word_embeddings"] = "output.weight" not in file.headers
    config["vocab_size"] = _rows(file, "token_embd.weight")
    if (config.get("pad_token_id") or 0) >= config["vocab_size"]:
        config["pad_token_id"] = None  # the class's own, for its own vocabulary
    if "n_positions" in config:
        config["n_positions"] = _rows(file, "position_embd.weight")
    for key, bias in (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias")):
        if key in config:
            config[key] = bias in file.headers
    if "query_pre_attn_scalar" in config:
        wide = config["num_hidden_layers"] in _LAYERS_OF_27B
        own = config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]
        config["query_pre_attn_scalar"] = own
    if file.architecture == "llama" and said("expert_count"):
        counts = {"num_local_experts": said("expert_count"), "num_experts_per_tok": said("expert_used_count")}
        config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **counts}
    if isinstance(config.get("rope_parameters"), dict):
        _rotary(file, config, said)
    return config


def _rotary(file: Gguf, config: dict[str, Any], said: Callable[[str], Any]) -> None:
    """Put the rotary embedding into the configuration, as transformers 5 has it."""
    rotary = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    before, kind = said("rope.scaling.original_context_length"), said("rope.scaling.type")
    if (base := said("rope.freq_base")) is not None:
        rotary["rope_theta"] = base
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if (turned := said("rope.dimension_count")) not in (None, width):
        rotary["partial_rotary_factor"] = turned / width
    if "rope_factors_long.weight" in file.headers:
        factors = {key: file.read(f"rope_factors_{key}.weight").tolist() for key in ("long", "short")}
        rotary |= {"rope_type": "longrope", **{f"{key}_factor": one for key, one in factors.items()}}
        config["original_max_position_embeddings"] = before
    elif "rope_freqs.weight" in file.headers:
        rotary |= _of_llama_3(file, rotary["rope_theta"], width)
    elif kind in ("linear", "yarn"):
        rotary |= {"rope_type": kind, "factor": said("rope.scaling.factor")}
        rotary |= {"original_max_position_embeddings": before} if before else {}


def _of_llama_3(file: Gguf, base: float, width: int) -> dict[str, Any]:
    """The settings of Llama 3.1 and later, of which the file has only what its frequencies are divided by.

    Raises:
        CheckpointError: Those are of no such settings.
    """
    divided = file.read("rope_freqs.weight")
    factor, before = float(divided.max()), 8192
    waves = 2 * torch.pi * base ** (torch.arange(0, width, 2) / width)
    # How many times a wave fits into the context that the model was first trained on: from one to four is between.
    smooth = ((before / waves - 1) / 3).clamp(0, 1)
    wanted = 1 / ((1 - smooth) / factor + smooth)
    if wanted.shape != divided.shape or not torch.allclose(wanted, divided, rtol=1e-3):
        raise CheckpointError(
            f"The rotary frequencies of `{file.label}` are none of Llama 3's; others are not known here."
        )
    return {
        **{"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": before,
    }


def _rows(file: Gguf, name: str) -> int:
    if name not in file.headers:
        raise CheckpointError(f"`{file.label}` holds no `{name}`, which every model of its architecture has.")
    return file.headers[name].shape[0]


def _short(value: Any) -> Any:
    """A number of float32 as it was written before it was one: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value
