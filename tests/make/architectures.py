"""Tiny models of many architectures, made from their configurations."""

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as tf

from tests.make import diffusion, models, multimodal, sweep_page

TEXT = {"input_ids": torch.arange(20)[None]}
TWO_TEXTS = {"input_ids": torch.arange(10)[None], "decoder_input_ids": torch.arange(5)[None]}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).sin().reshape(1, 3, 32, 32)}
SOUND = {
    "input_features": torch.linspace(-9, 9, 8 * 40).sin().reshape(1, 8, 40),
    "decoder_input_ids": torch.arange(5)[None],
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CODERS = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
EXPERTS = {"num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
WAVE = {"input_values": torch.linspace(-9, 9, 800).sin()[None]}
WAVES = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
}


class Architecture(NamedTuple):
    """How a model is made, and what it is asked."""

    make: Callable[[], torch.nn.Module]
    inputs: Mapping[str, torch.Tensor] = TEXT


def _of(model_class: str, config_class: str, inputs: Mapping[str, torch.Tensor] = TEXT, **sizes: Any) -> Architecture:
    return Architecture(lambda: getattr(tf, model_class)(getattr(tf, config_class)(**sizes)), inputs)


ARCHITECTURES = {
    "llama": Architecture(models.llama),
    "llama-tied": Architecture(lambda: models.llama(tie_word_embeddings=True)),
    "mistral": _of("MistralForCausalLM", "MistralConfig", **SIZES, num_key_value_heads=2),
    "qwen2": Architecture(models.qwen2),
    "qwen3": _of("Qwen3ForCausalLM", "Qwen3Config", **SIZES, head_dim=8, num_key_value_heads=2),
    "gemma2": Architecture(models.gemma2),
    "phi3": _of("Phi3ForCausalLM", "Phi3Config", **SIZES, pad_token_id=0),
    "gpt2": Architecture(models.gpt2),
    "gpt_neo": _of(
        *("GPTNeoForCausalLM", "GPTNeoConfig"),
        **{"vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4},
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    ),
    "gpt_neox": _of("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES),
    "opt": _of(
        *("OPTForCausalLM", "OPTConfig"),
        **{name: size for name, size in SIZES.items() if name != "intermediate_size"},
        ffn_dim=48,
        word_embed_proj_dim=32,
    ),
    "bloom": _of("BloomForCausalLM", "BloomConfig", vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "falcon": _of(
        *("FalconForCausalLM", "FalconConfig"),
        **{"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "olmo2": _of("Olmo2ForCausalLM", "Olmo2Config", **SIZES),
    "granite": _of("GraniteForCausalLM", "GraniteConfig", **SIZES, num_key_value_heads=2),
    "stablelm": _of("StableLmForCausalLM", "StableLmConfig", **SIZES, num_key_value_heads=4),
    "starcoder2": _of("Starcoder2ForCausalLM", "Starcoder2Config", **SIZES, num_key_value_heads=2),
    "bert": Architecture(models.bert),
    "roberta": _of("RobertaForMaskedLM", "RobertaConfig", **SIZES),
    "deberta-v2": _of(
        *("DebertaV2ForMaskedLM", "DebertaV2Config"),
        **SIZES,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
    ),
    "t5": Architecture(models.t5, TWO_TEXTS),
    "bart": _of("BartForConditionalGeneration", "BartConfig", TWO_TEXTS, **CODERS, max_position_embeddings=64),
    "whisper": _of(
        *("WhisperForConditionalGeneration", "WhisperConfig", SOUND),
        **CODERS,
        **{"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    ),
    "vit": _of(
        *("ViTForImageClassification", "ViTConfig", IMAGE),
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        image_size=32,
        patch_size=8,
    ),
    "resnet": _of(
        *("ResNetForImageClassification", "ResNetConfig", IMAGE),
        **{"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "convnext": _of(
        *("ConvNextForImageClassification", "ConvNextConfig", IMAGE),
        **{"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    ),
    "mamba": _of("MambaForCausalLM", "MambaConfig", vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mixtral": Architecture(models.mixtral),
    "qwen2_moe": _of("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **SIZES, **EXPERTS, shared_expert_intermediate_size=16),
    "qwen3_moe": Architecture(lambda: models.qwen3_moe(mlp_only_layers=[0])),
    "deepseek_v3": _of(
        *("DeepseekV3ForCausalLM", "DeepseekV3Config"),
        **{**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 4},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        **{"moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    ),
    "gpt_oss": _of(
        *("GptOssForCausalLM", "GptOssConfig"),
        **{**SIZES, "num_key_value_heads": 2, "head_dim": 8},
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
    "gemma3": _of("Gemma3ForCausalLM", "Gemma3TextConfig", **SIZES, num_key_value_heads=2, head_dim=8),
    "mamba2": _of(
        *("Mamba2ForCausalLM", "Mamba2Config"),
        **{"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "num_heads": 8, "head_dim": 8},
        n_groups=1,
    ),
    "clip-vision": _of(
        *("CLIPVisionModel", "CLIPVisionConfig", IMAGE),
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        image_size=32,
        patch_size=8,
    ),
    "siglip": _of(
        *("SiglipVisionModel", "SiglipVisionConfig", IMAGE),
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        image_size=32,
        patch_size=8,
    ),
    "wav2vec2": _of("Wav2Vec2ForCTC", "Wav2Vec2Config", WAVE, **WAVES),
    "clip": Architecture(multimodal.clip, multimodal.CLIP),
    "llava": Architecture(multimodal.llava, multimodal.LLAVA),
    "gemma3-images": Architecture(multimodal.gemma3, multimodal.GEMMA3),
    "qwen2_5_vl": Architecture(multimodal.qwen2_5_vl, multimodal.QWEN2_5_VL),
    "qwen3_vl": Architecture(multimodal.qwen3_vl, multimodal.QWEN3_VL),
    "qwen3_vl_moe": Architecture(multimodal.qwen3_vl_moe, multimodal.QWEN3_VL),
    "llama4": Architecture(multimodal.llama4, multimodal.LLAMA4),
    "qwen3_moe-no-dense": Architecture(models.qwen3_moe),
    "phimoe": _of("PhimoeForCausalLM", "PhimoeConfig", **SIZES, **LOCAL_EXPERTS),
    "granitemoe": _of("GraniteMoeForCausalLM", "GraniteMoeConfig", **SIZES, **LOCAL_EXPERTS),
    "jetmoe": _of(
        *("JetMoeForCausalLM", "JetMoeConfig"),
        **SIZES,
        **{"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "switch": _of(
        *("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", TWO_TEXTS),
        **{"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2},
        **{"num_heads": 4, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        decoder_start_token_id=0,
    ),
    "granitemoehybrid": _of(
        *("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig"),
        **SIZES | LOCAL_EXPERTS | MAMBA,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=16,
    ),
    "falcon_h1": _of(
        *("FalconH1ForCausalLM", "FalconH1Config"),
        **SIZES | MAMBA,
        **{"mamba_d_ssm": 64, "num_key_value_heads": 2, "head_dim": 8},
    ),
    "jamba": _of(
        *("JambaForCausalLM", "JambaConfig"),
        **{**SIZES, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},
    ),
    "qwen3_next": _of(
        *("Qwen3NextForCausalLM", "Qwen3NextConfig"),
        **SIZES | EXPERTS,
        **{"head_dim": 8, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4},
        **{"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2": _of(
        "Lfm2ForCausalLM", "Lfm2Config", **SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    ),
    "modernbert": _of(
        *("ModernBertForMaskedLM", "ModernBertConfig"),
        **SIZES,
        **{"pad_token_id": 0, "local_attention": 8, "global_attn_every_n_layers": 2},
    ),
    "albert": _of("AlbertForMaskedLM", "AlbertConfig", **SIZES, embedding_size=16),
    "xlnet": _of("XLNetLMHeadModel", "XLNetConfig", vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "mobilebert": _of(
        *("MobileBertForMaskedLM", "MobileBertConfig"),
        **{**SIZES, "num_hidden_layers": 1, "num_feedforward_networks": 1},
        **{"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    "swin": _of(
        *("SwinForImageClassification", "SwinConfig", IMAGE),
        **{"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "wavlm": _of("WavLMForCTC", "WavLMConfig", WAVE, **WAVES),
    "diffusers-unet": Architecture(diffusion.unet, diffusion.UNET),
    "diffusers-sd3": Architecture(diffusion.sd3, diffusion.SD3),
    "diffusers-flux": Architecture(diffusion.flux, diffusion.FLUX),
}


def pair_of(name: str, folder: Any) -> tuple[str, str]:
    """Folders of such a model and of a fine-tune of it in which every parameter moved."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].make()
    for parameter, values in model.named_parameters():
        if values.ndim == 1:
            # Biases that are zero, and norms that are one, would hide how they are used.
            centre = 1.0 if "norm" in parameter.lower() and parameter.endswith("weight") else 0.0
            torch.nn.init.normal_(values, centre, 0.1)
    return models.save_pair(model, folder)


@torch.no_grad()
def outputs(name: str, model: torch.nn.Module) -> torch.Tensor:
    """What a model gives first."""
    return model(**ARCHITECTURES[name].inputs)[0].float()


def error(name: str, got: torch.nn.Module, base: Any, tuned: Any) -> float:
    """How far a model's outputs are from the tuned one's, as a share of how far the base's are.

    Args:
        name: Of the architecture.
        got: The model.
        base: A folder, or the loaded model.
        tuned: The same.
    """
    wanted = outputs(name, models.load(tuned))
    apart = (outputs(name, models.load(base)) - wanted).norm()
    assert apart > 0
    return float((outputs(name, got) - wanted).norm() / apart)


EVERYTHING: dict[str, Any] = {"embeddings": True, "head": True, "conv": True, "experts": "fused"}

_PAGE = """# Architectures

What an adapter holds of {count} architectures, by `python -m docs.make architectures`: tiny models with random
weights, of which every parameter moved by noise of one size, so that shares of energy are shares of parameters. A real
fine-tune moves them otherwise: its own report tells. PEFT {peft}, transformers {transformers}.

- **portable**: the share of the fine-tune's energy that can be carried, by default and with `--embeddings --head --conv
  --experts fused`; and what of it is left out even then, in numbers of tensors.
- **peft**: how far the outputs of base + adapter (`--form peft`, full rank) are from the tuned model's, as a share of
  how far the base's are; and what is left out. Single parameters that are named there belong to modules that hold
  layers with factors too, or to no module but the model: PEFT has no place for them. Some have no part in the outputs
  that are compared. Without them the error is that of rounding everywhere, in both forms: a test of each row.

| architecture | portable | with all options | left out | peft: error | left out |
|---|--:|--:|---|--:|---|
"""


def page() -> str:
    """What an adapter holds of each architecture, as a table."""
    import peft

    rows = [_row(name) for name in ARCHITECTURES]
    head = _PAGE.format(count=len(rows), peft=peft.__version__, transformers=tf.__version__)
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows) + sweep_page.kept()


def _row(name: str) -> list[str]:
    import peft_posthoc

    with tempfile.TemporaryDirectory() as folder:
        base, tuned = pair_of(name, Path(folder))
        default, most, exact = (
            peft_posthoc.extract(base, tuned, 4096, **options) for options in ({}, EVERYTHING, {"form": "peft"})
        )
        loaded = models.load_adapter(base, exact.save(Path(folder) / "out"), tied=True, unbiased=True)
        apart = error(name, loaded, base, tuned)
    shares = [f"{adapter.report.totals.energy_of_all:.1%}" for adapter in (default, most)]
    return [name, *shares, _left_out(most), f"{apart:.0e}", _left_out(exact)]


def _left_out(adapter: Any) -> str:
    kinds = Counter(_kind(row.weight, row.reason) for row in adapter.report.rows if row.status == "left out")
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


def _kind(weight: str, reason: str) -> str:
    what = reason.partition(" (")[0]
    return f"`{weight.rpartition('.')[2]}`" if what.startswith("a parameter of") else what
