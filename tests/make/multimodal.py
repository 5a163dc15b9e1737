"""Tiny models that take images, videos or sounds with text, and what they are asked."""

import torch
import transformers as tf

TEXT = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
VISION = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"image_size": 32, "patch_size": 8},
}
IMAGE_TOKEN, VIDEO_TOKEN, START, END = 90, 91, 92, 93


def waves(*shape):
    """Values as an image or a sound may have them."""
    count = torch.Size(shape).numel()
    return torch.linspace(-9, 9, count).sin().reshape(shape)


def prompt(*counts):
    """Token ids: text, and a run of each of these tokens, as often as told."""
    ids = [1, 2, 3]
    for token, count in counts:
        ids += [START, *[token] * count, END, 4, 5]
    return torch.tensor([ids])


def llava():
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**TEXT),
        vision_config=tf.CLIPVisionConfig(**VISION | {"num_hidden_layers": 3}),
        image_token_index=IMAGE_TOKEN,
    )
    return tf.LlavaForConditionalGeneration(config)


LLAVA = {"input_ids": prompt((IMAGE_TOKEN, 16)), "pixel_values": waves(1, 3, 32, 32)}


def gemma3():
    config = tf.Gemma3Config(
        text_config=TEXT | {"head_dim": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_id=IMAGE_TOKEN,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return tf.Gemma3ForConditionalGeneration(config)


_IDS = prompt((IMAGE_TOKEN, 4))
GEMMA3 = {"input_ids": _IDS, "token_type_ids": (_IDS == IMAGE_TOKEN).long(), "pixel_values": waves(1, 3, 32, 32)}

_TOKENS = {
    **{"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN},
    **{"vision_start_token_id": START, "vision_end_token_id": END},
}
_PATCHES = {"hidden_size": 32, "num_heads": 4, "depth": 2, "patch_size": 4, "in_channels": 3, "out_hidden_size": 32}


def qwen2_5_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = tf.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=_PATCHES | {"intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]},
        **_TOKENS,
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(**changes):
    return tf.Qwen3VLForConditionalGeneration(_qwen3_vl(tf.Qwen3VLConfig, **changes))


def qwen3_vl_moe():
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    return tf.Qwen3VLMoeForConditionalGeneration(_qwen3_vl(tf.Qwen3VLMoeConfig, **experts))


def _qwen3_vl(config, **changes):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    return config(
        text_config=TEXT | {"head_dim": 8, "rope_parameters": rope} | changes,
        vision_config=_PATCHES
        | {"intermediate_size": 48, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_TOKENS,
    )


def _types(ids):
    return (ids == IMAGE_TOKEN).int() + 2 * (ids == VIDEO_TOKEN).int()


def _qwen(video):
    """An image of 4 x 4 patches, and a video of two times as many; four patches are one token."""
    ids = torch.cat([prompt((IMAGE_TOKEN, 4)), video], 1)
    return {
        "input_ids": ids,
        "mm_token_type_ids": _types(ids),
        "pixel_values": waves(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": waves(32, 3 * 2 * 4 * 4).cos(),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }


QWEN2_5_VL = _qwen(prompt((VIDEO_TOKEN, 8)))
# Qwen3-VL has each time of a video by itself.
QWEN3_VL = _qwen(prompt((VIDEO_TOKEN, 4), (VIDEO_TOKEN, 4)))


def llama4():
    config = tf.Llama4Config(
        text_config=TEXT
        | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"moe_layers": [1], "pad_token_id": 0, "attn_temperature_tuning": False},
        vision_config=VISION
        | {"intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        image_token_index=IMAGE_TOKEN,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return tf.Llama4ForConditionalGeneration(config)


LLAMA4 = {"input_ids": prompt((IMAGE_TOKEN, 4)), "pixel_values": waves(1, 3, 32, 32)}


def clip():
    text = TEXT | {"eos_token_id": 95, "bos_token_id": 1, "pad_token_id": 0}
    text.pop("num_key_value_heads")
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


CLIP = {"input_ids": torch.tensor([[1, 7, 8, 95], [1, 9, 95, 95]]), "pixel_values": waves(2, 3, 32, 32)}
