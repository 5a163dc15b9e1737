"""Tiny models of diffusers, and what they are asked."""

import copy
import re

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


def inputs(model):
    """What a tiny component is asked: a picture or a video of 4 x 4 or 8 x 8, a text of five tokens, a time."""
    config = model.config
    width = next(
        config[name]
        for name in (
            *("cross_attention_dim", "joint_attention_dim", "text_embed_dim", "text_dim", "cap_feat_dim"),
            "caption_channels",
        )
        if config.get(name)
    )
    channels, text = config["in_channels"], waves(1, 5, width)
    seen = {"UNet2DConditionModel": UNET, "SD3Transformer2DModel": SD3, "FluxTransformer2DModel": FLUX}
    made = {
        "Flux2Transformer2DModel": {
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), torch.zeros(1)),
            "txt_ids": torch.zeros(5, 4),
            "guidance": torch.tensor([2.0]),
        },
        "QwenImageTransformer2DModel": {
            "img_shapes": [(1, 4, 4)],
            "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.bool),
        },
        "WanTransformer3DModel": {"encoder_hidden_states_image": waves(1, 3, config.get("image_dim") or 1)},
        "HunyuanVideoTransformer3DModel": {
            "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
            "pooled_projections": waves(1, config.get("pooled_projection_dim") or 1),
            "guidance": torch.tensor([2.0]),
        },
        "LTXVideoTransformer3DModel": {
            "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
            **{"num_frames": 1, "height": 4, "width": 4},
        },
    }
    kind = type(model).__name__
    if kind == "ZImageTransformer2DModel":
        return {"x": [waves(channels, 1, 4, 4)], "t": torch.tensor([0.3]), "cap_feats": [text[0]]}
    if kind in seen:
        more = {"added_cond_kwargs": {"text_embeds": waves(1, 4), "time_ids": waves(1, 3)}}
        return seen[kind] | (more if config.get("addition_embed_type") else {})
    moving = kind in ("WanTransformer3DModel", "HunyuanVideoTransformer3DModel")
    picture = waves(1, channels, 1, 4, 4) if moving else waves(1, 16, channels)
    common = {"hidden_states": picture, "encoder_hidden_states": text, "timestep": torch.tensor([3.0])}
    return common | made[kind]


def outputs(model):
    """What a component makes of its inputs."""
    with torch.no_grad():
        found = model.eval()(**inputs(model), return_dict=False)[0]
    return found[0] if isinstance(found, list) else found


LAYERS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)


def moved(model, kinds=LAYERS, but="$^"):
    """A copy of a model with the parameters of these kinds of modules moved, but for those of such a name."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in tuned.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False) if isinstance(module, kinds) else ():
                if not re.search(but, f"{name}.{leaf}"):
                    parameter += 0.02 * torch.randn_like(parameter)
    return tuned
