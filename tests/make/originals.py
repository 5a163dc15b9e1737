"""Tiny components of diffusers, and their tensors under the names of a single file."""

import re

from peft_posthoc.checkpoints.checkpoint import Header
from tests.make import diffusion
from tests.make.open_clip import under_open_clip
from tests.make.original_names import originals

PREFIX = "model.diffusion_model."


def sdxl():
    return diffusion.unet(
        layers_per_block=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16,
    )


def sd35():
    from diffusers import SD3Transformer2DModel

    config = dict(diffusion.sd3().config) | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    return SD3Transformer2DModel.from_config(config)


def flux2():
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
    )


def qwen_image():
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )


def wan():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        image_dim=16,
        added_kv_proj_dim=24,
    )


def z_image():
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 64, 64],
    )


def hunyuan_video(heads=2, width=8):
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=width,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    )


def ltx():
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )


FAMILIES = {
    "sd15": diffusion.unet,
    "sdxl": sdxl,
    "sd3": diffusion.sd3,
    "sd35": sd35,
    "flux": diffusion.flux,
    "flux2": flux2,
    "qwen-image": qwen_image,
    "wan": wan,
    "z-image": z_image,
    "hunyuan-video": hunyuan_video,
    "ltx": ltx,
}

# Of the UNet, module by module within a block.
_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def under_original_names(model, tensors=None, prefix=PREFIX):
    """The tensors of a component as a single file has them."""
    tensors = model.state_dict() if tensors is None else tensors
    cls = type(model).__name__
    if cls == "UNet2DConditionModel":
        layers = model.config.layers_per_block
        return {f"{PREFIX}{_of_unet(name, layers, tensors)}": tensor for name, tensor in tensors.items()}
    headers = {name: Header(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    made = originals(cls, headers)
    return {f"{prefix}{name}": piece.make(*map(tensors.get, piece.sources)) for name, piece in made.items()}


def _of_unet(name, layers, tensors):
    module, _, leaf = name.rpartition(".")
    if module in _UNET:
        return f"{_UNET[module]}.{leaf}"
    side, part, number, rest = re.fullmatch(r"(\w+?_blocks?(?:\.\d+)?)\.(\w+)\.(\d+)\.(.*)", name).groups()
    number = int(number)
    if part == "resnets":
        module, _, leaf = rest.rpartition(".")
        rest = f"{_RESNET[module]}.{leaf}"
    if side == "mid_block":
        return f"middle_block.{2 * number if part == 'resnets' else 1}.{rest}"
    side, block = side.split(".")
    first = int(block) * (layers + 1)
    if part == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        after = 2 if any(name.startswith(f"up_blocks.{block}.attentions") for name in tensors) else 1
        return f"output_blocks.{first + layers}.{after}.{rest}"
    place = f"input_blocks.{first + number + 1}" if side == "down_blocks" else f"output_blocks.{first + number}"
    return f"{place}.{0 if part == 'resnets' else 1}.{rest}"


def sdxl_file(unet, text_encoder, text_encoder_2):
    """The tensors of a single file of SDXL, with its text encoders."""
    tensors = under_original_names(unet)
    for name, value in text_encoder.state_dict().items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{name}"] = value
    tensors |= under_open_clip(text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    return {name: value.contiguous() for name, value in tensors.items()}
