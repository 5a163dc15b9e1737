"""Tiny models that are stored in other pieces than they compute with, and what PEFT makes of adapters for them."""

import shutil
import warnings
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import save_file

from tests.make import models
from tests.make.architectures import SIZES
from tests.sweep import share, untie, without_zero_biases

_HEADS = {**SIZES, "num_key_value_heads": 2}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "patch_size": 8,
}


def step3p7():
    text = {
        **{**_HEADS, "head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"share_expert_dim": 16, "mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention"] * 2},
        **{"pad_token_id": 0, "num_sliding_attention_heads": 4},
    }
    vision = {**_VISION, "image_size": 32}
    config = tf.Step3p7Config(text_config=text, vision_config=vision, image_token_id=90)
    return tf.Step3p7ForConditionalGeneration(config)


def kimi_k25():
    text = {
        **{**SIZES, "model_type": "deepseek_v3", "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1},
        **{"num_experts_per_tok": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16},
        **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    }
    config = tf.Kimi_K25Config(text_config=text, vision_config=_VISION, image_token_id=90, tie_word_embeddings=False)
    return tf.Kimi_K25ForConditionalGeneration(config)


def diffusion_gemma():
    text = {
        **{**_HEADS, "head_dim": 8, "global_head_dim": 8, "num_global_key_value_heads": 2, "sliding_window": 8},
        **{"layer_types": ["sliding_attention", "full_attention"], "num_experts": 4, "top_k_experts": 2},
        **{"moe_intermediate_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    vision = {**_VISION, "num_key_value_heads": 2, "head_dim": 8}
    tokens = {"image_token_id": 90, "boi_token_id": 91, "eoi_token_id": 92}
    config = tf.DiffusionGemmaConfig(text_config=text, vision_config=vision, **tokens)
    return tf.DiffusionGemmaForBlockDiffusion(config)


def _olmo_hybrid():
    layers = ["linear_attention", "full_attention"]
    return tf.OlmoHybridForCausalLM(
        tf.OlmoHybridConfig(**SIZES, num_key_value_heads=4, layer_types=layers, pad_token_id=0)
    )


def _dinov2():
    sizes = {name: size for name, size in _VISION.items() if name != "intermediate_size"}
    return tf.Dinov2Model(tf.Dinov2Config(**sizes, image_size=32, use_swiglu_ffn=True))


# Fused matrices that are split; also with their rows in another order; and parts that are put together.
MODELS = {
    "gte": lambda: tf.GteForMaskedLM(tf.GteConfig(**SIZES, pad_token_id=0, tie_word_embeddings=False)),
    "dinov2": _dinov2,
    "step3p7": step3p7,
    "kimi_k25": kimi_k25,
    "olmo_hybrid": _olmo_hybrid,
}


def pair_of(make, folder):
    """Folders of such a model and of a fine-tune of it, the second one loaded too."""
    torch.manual_seed(0)
    model = make()
    for values in model.parameters():
        if values.ndim == 1:
            torch.nn.init.normal_(values, 1, 0.1)
    return models.save_pair(model, folder)


def under_live_names(folder, to):
    """A model's folder with the tensors of the live model, as FSDP and DeepSpeed gather them."""
    to.mkdir()
    shutil.copy(Path(folder) / "config.json", to)
    tensors = {name: value.detach().contiguous() for name, value in models.load(folder).named_parameters()}
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def merged(base, adapter):
    """A model with an adapter, as stock PEFT merges them; what it shares is merged in each place by itself."""
    model = models.load_adapter(base, adapter, tied=True, unbiased=True)
    untie(model)
    without_zero_biases(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True` and the tied_target_modules")
        return model.merge_and_unload()


def true_share(base, tuned, got):
    """How much of a fine-tune's energy a model has."""
    return share(models.load(base), models.load(tuned), got)[0]
