"""LoRA files of image models as adapters: the names of each program, scales, differences, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import AdapterError, CheckpointError, MismatchError, export, open_checkpoint, resize
from peft_posthoc.adapters.image_names import of_sgm, read_name
from peft_posthoc.adapters.open import open_adapter
from peft_posthoc.models.original_modules import family_of
from tests.make import diffusion

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{Q.replace('.', '_')}"
CONV = "down_blocks.1.resnets.0.conv1"
NAMES = {
    f"{KOHYA}.lora_down.weight": (Q,),
    f"unet.{Q}.lora_A.weight": (Q,),
    f"unet.{Q}_lora.down.weight": (Q,),
    f"unet.{Q.replace('to_q', 'processor.to_q')}_lora.down.weight": (Q,),
    "lora_unet_input_blocks_4_1_transformer_blocks_3_attn2_to_out_0.alpha": (
        "down_blocks.1.attentions.0.transformer_blocks.3.attn2.to_out.0",
    ),
    "lora_unet_input_blocks_3_0_op.lora_up.weight": ("down_blocks.0.downsamplers.0.conv",),
    "lora_unet_output_blocks_5_2_conv.lora_up.weight": ("up_blocks.1.upsamplers.0.conv",),
    "lora_unet_output_blocks_8_0_skip_connection.lora_up.weight": ("up_blocks.2.resnets.2.conv_shortcut",),
    "lora_unet_middle_block_1_proj_in.lora_up.weight": ("mid_block.attentions.0.proj_in",),
    "lora_unet_middle_block_2_in_layers_2.lora_up.weight": ("mid_block.resnets.1.conv1",),
    "lora_unet_label_emb_0_2.lora_up.weight": ("add_embedding.linear_2",),
    "lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_up.weight": ("text_model.encoder.layers.31.mlp.fc1",),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": (
        "text_model.encoder.layers.0.self_attn.q_proj",
    ),
    "lora_unet_double_blocks_18_txt_attn_qkv.lora_up.weight": tuple(
        f"transformer_blocks.18.attn.add_{x}_proj" for x in "qkv"
    ),
    "lora_unet_single_blocks_37_linear2.lora_up.weight": ("single_transformer_blocks.37.proj_out",),
    "diffusion_model.blocks.3.cross_attn.k_img.lora_A.weight": ("blocks.3.attn2.add_k_proj",),
    "lora_unet_blocks_3_ffn_2.lora_up.weight": ("blocks.3.ffn.net.2",),
    "diffusion_model.layers.0.attention.out.lora_A.weight": ("layers.0.attention.to_out.0",),
    "lora_unet_transformer_blocks_5_txt_mod_1.lora_up.weight": ("transformer_blocks.5.txt_mod.1",),
    "diffusion_model.joint_blocks.2.x_block.mlp.fc1.lora_up.weight": ("transformer_blocks.2.ff.net.0.proj",),
}


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    diffusion.unet().save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def shape(base, module):
    return open_checkpoint(base).headers[f"{module}.weight"].shape


def factors(base, module, rank):
    m, n = shape(base, module)
    return torch.randn(rank, n), torch.randn(m, rank)


def added(base, file, module, leaf="weight"):
    """What a file adds to a tensor."""
    name = f"{module}.{leaf}"
    return open_checkpoint(f"{base}+{file}").read(name) - open_checkpoint(base).read(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_any_program_leads_to_diffusers_module(name):
    named = read_name(name)
    assert named.modules(family_of({named.module: named.underscored}, None)) == NAMES[name]


@pytest.mark.parametrize("odd", ["output_blocks.2.2.in_layers.0", "input_blocks.0.0.conv", "input_blocks.1.5.op"])
def test_a_block_that_no_unet_has_keeps_its_name(odd):
    assert of_sgm(odd) == odd


# What a file holds beside: the same name is another module in another model.
TOLD_BY_OTHERS = [
    ("img_in", "double_blocks.0.img_attn.qkv", None, ("x_embedder",)),
    ("img_in", "transformer_blocks.0.attn.to_q", None, ("img_in",)),
    ("final_layer.linear", "layers.0.attention.qkv", None, ("all_final_layer.2-1.linear",)),
    ("final_layer.linear", "joint_blocks.0.x_block.attn.qkv", None, ("proj_out",)),
    ("adaln_single.linear", "transformer_blocks.0.attn1.to_q", None, ("time_embed.linear",)),
    ("double_blocks.0.img_mlp.0", "img_in", 4, ("transformer_blocks.0.ff.net.0.proj",)),
    ("double_blocks.0.img_mlp.0", "img_in", 6, ("transformer_blocks.0.ff.linear_in",)),
    ("time_in.in_layer", "double_stream_modulation_img.lin", None, ("time_guidance_embed.timestep_embedder.linear_1",)),
]


@pytest.mark.parametrize(("module", "beside", "widening", "wanted"), TOLD_BY_OTHERS)
def test_a_name_that_several_models_have_is_told_by_the_others_in_the_file(module, beside, widening, wanted, tmp_path):
    for prefix, underscored in (("diffusion_model.", False), ("lora_unet_", True)):
        rows = 2 * (widening or 1)
        tensors = {}
        for name, m in ((module, rows), (beside, 12)):
            own = f"{prefix}{name.replace('.', '_') if underscored else name}"
            tensors |= {f"{own}.lora_down.weight": torch.ones(1, 2), f"{own}.lora_up.weight": torch.ones(m, 1)}
        save_file(tensors, tmp_path / "lora.safetensors")
        assert {*wanted} <= open_adapter(tmp_path / "lora.safetensors").modules.keys()


def test_names_of_diffusers_are_no_authors_names(tmp_path):
    tensors = {}
    for name in ("adaln_single.linear", "img_in", "single_transformer_blocks.0.attn.to_out", "transformer_blocks.0.x"):
        tensors[f"transformer.{name}.lora_A.weight"] = torch.ones(1, 2)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.ones(2, 1)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = open_adapter(tmp_path / "lora.safetensors").modules
    assert {"adaln_single.linear", "img_in", "single_transformer_blocks.0.attn.to_out"} <= found.keys()


def test_each_module_has_its_own_alpha_whatever_the_ranks(base, tmp_path):
    (a, b), (c, d) = factors(base, Q, 4), factors(base, Q.replace("to_q", "to_k"), 2)
    key = KOHYA.replace("to_q", "to_k")
    tensors = {f"{KOHYA}.lora_down.weight": a, f"{KOHYA}.lora_up.weight": b, f"{KOHYA}.alpha": torch.tensor(1.0)}
    save_file(tensors | {f"{key}.lora_down.weight": c, f"{key}.lora_up.weight": d}, tmp_path / "lora.safetensors")
    torch.testing.assert_close(added(base, tmp_path / "lora.safetensors", Q), b @ a / 4, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        added(base, tmp_path / "lora.safetensors", Q.replace("to_q", "to_k")), d @ c, rtol=1e-5, atol=1e-5
    )
    resize(tmp_path / "lora.safetensors", 4, dtype=torch.float32).save(tmp_path / "small")
    torch.testing.assert_close(added(base, tmp_path / "small", Q), b @ a / 4, rtol=1e-4, atol=1e-4)


def test_diffusers_scale_is_what_the_header_says(base, tmp_path):
    a, b = factors(base, Q, 4)
    header = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {}, "unet.target_modules": ["to_q"]}
    metadata = {"lora_adapter_metadata": json.dumps(header)}
    save_file(
        {f"unet.{Q}.lora_A.weight": a, f"unet.{Q}.lora_B.weight": b}, tmp_path / "x.safetensors", metadata=metadata
    )
    torch.testing.assert_close(added(base, tmp_path / "x.safetensors", Q), 2 * b @ a, rtol=1e-5, atol=1e-5)


def test_three_factors_of_a_convolution_are_their_product(base, tmp_path):
    m, n, *kernel = shape(base, CONV)
    up, mid, down = torch.randn(m, 3, 1, 1), torch.randn(3, 3, *kernel), torch.randn(3, n, 1, 1)
    key = f"lora_unet_{CONV.replace('.', '_')}"
    parts = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down, "alpha": torch.tensor(3.0)}
    save_file({f"{key}.{part}": value for part, value in parts.items()}, tmp_path / "x.safetensors")
    wanted = torch.einsum("mp,pqkl,qn->mnkl", up[..., 0, 0], mid, down[..., 0, 0])
    torch.testing.assert_close(added(base, tmp_path / "x.safetensors", CONV), wanted, rtol=1e-4, atol=1e-4)


def test_differences_and_whole_weights_are_there_with_the_base_and_refused_without(base, tmp_path):
    (a, b), norm = factors(base, Q, 2), torch.randn(shape(base, "conv_norm_out"))
    tensors = {
        f"{KOHYA}.lora_down.weight": a,
        f"{KOHYA}.lora_up.weight": b,
        "lora_unet_conv_norm_out.diff": norm,
        "lora_unet_conv_norm_out.diff_b": 2 * norm,
        "lora_unet_conv_out.set_weight": torch.zeros(shape(base, "conv_out")),
    }
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    torch.testing.assert_close(added(base, file, "conv_norm_out"), norm)
    torch.testing.assert_close(added(base, file, "conv_norm_out", "bias"), 2 * norm)
    assert not open_checkpoint(f"{base}+{file}").read("conv_out.weight").any()
    with pytest.raises(MismatchError, match=r"adds to `conv_norm_out\.weight` by no factors"):
        resize(file, 1)
    with pytest.raises(AdapterError, match="which kohya's format does not read"):
        export(file, tmp_path / "y.safetensors", "kohya", base=base)
    export(file, tmp_path / "y.safetensors", "comfyui", base=base)
    assert torch.equal(load_file(tmp_path / "y.safetensors")["lora_unet_conv_norm_out.diff"], norm)


def test_of_several_components_one_is_named(base, tmp_path):
    a, b = factors(base, Q, 2)
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{KOHYA}.lora_down.weight": a, f"{KOHYA}.lora_up.weight": b}
    tensors |= {f"{text}.lora_down.weight": torch.ones(2, 8), f"{text}.lora_up.weight": torch.ones(8, 2)}
    file = tmp_path / "both.safetensors"
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"Give one of them: `.*:denoiser`, `.*:text_encoder`\.$"):
        open_adapter(file)
    assert list(open_adapter(f"{file}:text_encoder").modules) == ["text_model.encoder.layers.0.mlp.fc1"]
    torch.testing.assert_close(added(base, f"{file}:denoiser", Q), b @ a, rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match="has nothing for `vae`; it has denoiser, text_encoder"):
        open_adapter(f"{file}:vae")


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"dora_scale": (32, 1)}, "is DoRA, which also rescales the base's weights"),
        ({"lokr_w1": (2, 2)}, "is LoKr in Tucker's form, or DoRA with it"),
        ({"alpha": (2,)}, "which is no finite number"),
    ],
)
def test_what_is_no_delta_of_factors_is_refused(tensors, told, tmp_path):
    plain = {f"{KOHYA}.lora_down.weight": torch.ones(2, 8), f"{KOHYA}.lora_up.weight": torch.ones(8, 2)}
    save_file(plain | {f"{KOHYA}.{key}": torch.ones(of) for key, of in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=told):
        open_adapter(tmp_path / "x.safetensors")


def test_half_of_a_pair_and_a_file_as_a_model_are_refused(tmp_path):
    save_file({f"{KOHYA}.lora_down.weight": torch.ones(2, 8)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match="without its counterpart"):
        open_adapter(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is no model but an adapter in the format of kohya's scripts"):
        open_checkpoint(tmp_path / "x.safetensors")
