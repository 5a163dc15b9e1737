"""Tiny models of diffusers, and what they are asked."""

import torch

from tests.make.multimodal import waves


def unet(layers_per_block=1, **more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=layers_per_block,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


UNET = {"sample": waves(1, 4, 8, 8), "timestep": torch.tensor([3]), "encoder_hidden_states": waves(1, 5, 16)}


def sd3():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=8,
    )


SD3 = {
    "hidden_states": waves(1, 4, 8, 8),
    "encoder_hidden_states": waves(1, 5, 32),
    "pooled_projections": waves(1, 64),
    "timestep": torch.tensor([3]),
}


def flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        axes_dims_rope=(2, 2, 4),
    )


FLUX = {
    "hidden_states": waves(1, 16, 4),
    "encoder_hidden_states": waves(1, 5, 32),
    "pooled_projections": waves(1, 64),
    "timestep": torch.tensor([0.3]),
    "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
    "txt_ids": torch.zeros(5, 3),
}
