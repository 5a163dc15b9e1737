"""LoRA files in diffusers itself: every component of a pipeline computes with them what base + adapter is."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from peft_posthoc import export, extract, open_checkpoint
from tests.formats.test_image_files import save_pair
from tests.make import diffusion, pipelines, small


def adapter(model, folder, name, seed=1, include=()):
    """A component's folder with an adapter, and the class that it is loaded with."""
    base, tuned = save_pair(model, folder, name, seed=seed)
    options = {"exclude": "norm|bias|embeddings|learnable", "include": include}
    extract(base, tuned, 64, dtype=torch.float32, form="peft", **options).save(folder / name)
    return base, folder / name, type(model)


def differences(pipe, made, folder, file):
    """By component, how far what diffusers fuses is from base + adapter; it has used every tensor of the file."""
    count = sum(not name.endswith(".alpha") for name in load_file(folder / file))
    state, loaded = pipelines.fused(pipe, str(folder), weight_name=file)
    assert loaded == count
    found = {}
    for name, (base, own, _) in made.items():
        wanted, before = open_checkpoint(f"{base}+{own}"), open_checkpoint(base)
        read = {key: wanted.read(key).double() for key in wanted.headers}
        assert any(not torch.equal(before.read(key).double(), value) for key, value in read.items())
        found[name] = max(float((state[name][key].double() - value).abs().max()) for key, value in read.items())
    return found


# The mixins that load LoRAs into other models, and a class of each that builds small.
OTHERS = {
    "AuraFlowLoraLoaderMixin": "AuraFlowTransformer2DModel",
    "CogVideoXLoraLoaderMixin": "CogVideoXTransformer3DModel",
    "Mochi1LoraLoaderMixin": "MochiTransformer3DModel",
    "LTXVideoLoraLoaderMixin": "LTXVideoTransformer3DModel",
    "SanaLoraLoaderMixin": "SanaTransformer2DModel",
    "HunyuanVideoLoraLoaderMixin": "HunyuanVideoTransformer3DModel",
    "Lumina2LoraLoaderMixin": "Lumina2Transformer2DModel",
    "WanLoraLoaderMixin": "WanTransformer3DModel",
    "CogView4LoraLoaderMixin": "CogView4Transformer2DModel",
    "QwenImageLoraLoaderMixin": "QwenImageTransformer2DModel",
    "ZImageLoraLoaderMixin": "ZImageTransformer2DModel",
    "Flux2LoraLoaderMixin": "Flux2Transformer2DModel",
    "KandinskyLoraLoaderMixin": "Kandinsky5Transformer3DModel",
    "Krea2LoraLoaderMixin": "Krea2Transformer2DModel",
    "ErnieImageLoraLoaderMixin": "ErnieImageTransformer2DModel",
    "CosmosLoraLoaderMixin": "CosmosTransformer3DModel",
    "AceStepLoraLoaderMixin": "AceStepTransformer1DModel",
}
PIPELINES = {
    "stable diffusion": ("StableDiffusionLoraLoaderMixin", "unet", diffusion.unet, 1),
    "stable diffusion xl": ("StableDiffusionXLLoraLoaderMixin", "unet", diffusion.unet, 2),
    "stable diffusion 3": ("SD3LoraLoaderMixin", "transformer", diffusion.sd3, 2),
    "flux": ("FluxLoraLoaderMixin", "transformer", diffusion.flux, 1),
    **{mixin: (mixin, "transformer", partial(small.make, cls), 0) for mixin, cls in OTHERS.items()},
}


# Of these the converters from the names of musubi-tuner know blocks alone.
BLOCKS = {"WanLoraLoaderMixin": r"^blocks\..*(attn\d|ffn)\.", "QwenImageLoraLoaderMixin": "transformer_blocks"}


# Of Flux diffusers' converter from kohya's names has the sizes of the large model.
@pytest.mark.parametrize(
    ("kind", "to"),
    [
        *((kind, "diffusers") for kind in PIPELINES),
        *((kind, "kohya") for kind in ("stable diffusion", "stable diffusion xl", *BLOCKS)),
        ("WanLoraLoaderMixin", "comfyui"),
    ],
)
def test_a_pipeline_adds_what_the_adapters_add(kind, to, tmp_path):
    mixin, name, make, texts = PIPELINES[kind]
    include = () if to == "diffusers" else BLOCKS.get(kind, ())
    made = {name: adapter(make(), tmp_path, name, include=include)}
    for number in range(texts):
        called = f"text_encoder{'_2' if number else ''}"
        made[called] = adapter(pipelines.clip(projection=bool(number)), tmp_path, called, seed=2 + number)
    (base, own, _), *others = made.values()
    beside = [f"{one}+{its}" for one, its, _ in others]
    export(own, tmp_path / "lora.safetensors", to, base=base, beside=beside)
    pipe = pipelines.loader(mixin, **{name: cls.from_pretrained(where) for name, (where, _, cls) in made.items()})
    assert max(differences(pipe, made, tmp_path, "lora.safetensors").values()) < 1e-5
