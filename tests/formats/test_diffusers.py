"""`--to diffusers`: what `pipe.load_lora_weights` makes of it is what PEFT makes of the adapter."""

import diffusers
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from peft_posthoc import AdapterError, export, extract
from tests.make import diffusion


def save_pair(model, folder, name):
    model.save_pretrained(folder / "base" / name)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    model.save_pretrained(folder / "tuned" / name)
    return folder / "base" / name, folder / "tuned" / name


def says(model):
    """A UNet's output for one input."""
    with torch.no_grad():
        return model.eval()(**diffusion.UNET).sample


@pytest.fixture
def pipe(tmp_path):
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            bos_token_id=0,
            eos_token_id=1,
        )
    )

    def make(base):
        return diffusers.StableDiffusionPipeline(
            vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
            text_encoder=clip,
            tokenizer=None,
            unet=diffusers.UNet2DConditionModel.from_pretrained(base),
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    return make


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": 0.7, "form": "peft", "exclude": "norm|conv_|bias"}])
def test_a_pipeline_adds_what_peft_adds(tmp_path, pipe, options):
    base, tuned = save_pair(diffusion.unet(), tmp_path, "unet")
    extract(base, tuned, conv=True, dtype=torch.float32, include=r"attn|conv\d", **options).save(tmp_path / "a")
    export(tmp_path / "a", tmp_path / "lora", "diffusers", base=base)
    made = pipe(base)
    before = says(made.unet)
    made.load_lora_weights(tmp_path / "lora")
    wanted = says(PeftModel.from_pretrained(diffusers.UNet2DConditionModel.from_pretrained(base), tmp_path / "a"))
    assert (says(made.unet) - wanted).norm() < 1e-4 * (wanted - before).norm()


def test_keys_begin_with_the_component(tmp_path):
    base, tuned = save_pair(diffusion.unet(), tmp_path, "somewhere")
    extract(base, tuned, 2, include="attn").save(tmp_path / "a")
    export(tmp_path / "a", tmp_path / "lora", "diffusers", base=base)
    names = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors").keys()
    assert names
    assert {name.partition(".")[0] for name in names} == {"unet"}


def test_a_language_model_is_no_component(llama_pair, tmp_path):
    extract(*llama_pair, 2).save(tmp_path / "a")
    with pytest.raises(AdapterError, match="no component"):
        export(tmp_path / "a", tmp_path / "lora", "diffusers", base=llama_pair[0])
    assert not (tmp_path / "lora").exists()


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
def test_that_biases_keep_a_file_from_being_fused_is_told(tmp_path, pipe):
    base, tuned = save_pair(diffusion.unet(), tmp_path, "unet")
    extract(base, tuned, 2, form="peft", include="attn1").save(tmp_path / "a")
    done = export(tmp_path / "a", tmp_path / "lora", "diffusers", base=base)
    assert any("`pipe.fuse_lora()` refuses it" in note for note in done.notes)
    made = pipe(base)
    made.load_lora_weights(tmp_path / "lora")
    with pytest.raises(RuntimeError):
        made.fuse_lora()
    extract(base, tuned, 2, form="peft", include="attn1", exclude=r"\.bias$").save(tmp_path / "b")
    assert not any("fuse_lora" in note for note in export(tmp_path / "b", tmp_path / "x", "diffusers", base=base).notes)
