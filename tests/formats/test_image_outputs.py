"""What models of diffusers compute with our files: what the fine-tune computes, or what is told to be left out."""

import pytest
import torch
from safetensors.torch import load_file

from peft_posthoc import export, extract, open_checkpoint
from tests.make import pipelines
from tests.make.diffusion import moved, outputs
from tests.make.originals import FAMILIES

MIXINS = {
    "sd15": "StableDiffusionLoraLoaderMixin",
    "sdxl": "StableDiffusionXLLoraLoaderMixin",
    "sd3": "SD3LoraLoaderMixin",
    "sd35": "SD3LoraLoaderMixin",
    "flux": "FluxLoraLoaderMixin",
    "flux2": "Flux2LoraLoaderMixin",
    "qwen-image": "QwenImageLoraLoaderMixin",
    "wan": "WanLoraLoaderMixin",
    "z-image": "ZImageLoraLoaderMixin",
    "hunyuan-video": "HunyuanVideoLoraLoaderMixin",
    "ltx": "LTXVideoLoraLoaderMixin",
}
# Of these diffusers' converter from kohya's names knows blocks alone: the names of what they are not.
BLOCKS = {"wan": r"^(?!blocks\..*(attn\d|ffn)\.)", "qwen-image": r"^(?!transformer_blocks\.)"}
# PEFT's form has it whole where its factors would be larger, as here.
SMALL = r"pos_embed\.proj"


def saved(base, tuned, folder):
    """Both in folders of their component's name."""
    name = "unet" if type(base).__name__.startswith("UNet") else "transformer"
    for side, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(folder / side / name)
    return folder / "base" / name, folder / "tuned" / name


def loaded(family, model, file):
    """The model with what diffusers itself loads of a file."""
    texts = dict.fromkeys(("text_encoder", "text_encoder_2"))
    pipe = pipelines.loader(MIXINS[family], **texts, **{file.parent.name: model})
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    count = sum(".lora_" in name for name in model.state_dict())
    assert count == sum(not name.endswith(".alpha") for name in load_file(file))
    return model


def loads(family, base, tuned, folder, to, **options):
    """What the base computes with the file that is extracted and written, and the extraction's account."""
    folders = saved(base, tuned, folder)
    adapter = extract(*folders, 2048, conv=True, dtype=torch.float32, **options)
    adapter.save(folder / "a")
    file = folder / folders[0].name / "lora.safetensors"
    file.parent.mkdir()
    export(folder / "a", file, to, base=folders[0])
    return outputs(loaded(family, base, file)), adapter.report


def furthest(one, other):
    return float((one - other).abs().max())


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_the_tuned_one_does_with_all_that_a_file_of_diffusers_holds(family, tmp_path):
    torch.manual_seed(0)
    base = FAMILIES[family]()
    tuned = moved(base, but=SMALL)
    before, wanted = outputs(base), outputs(tuned)
    found, _ = loads(family, base, tuned, tmp_path, "diffusers", form="peft")
    assert furthest(before, wanted) > 0.05
    assert furthest(found, wanted) < 1e-5


@pytest.mark.parametrize("family", ["sd15", "sdxl", *BLOCKS])
def test_a_model_computes_what_the_tuned_one_does_with_all_that_a_file_of_kohya_holds(family, tmp_path):
    torch.manual_seed(0)
    base = FAMILIES[family]()
    tuned = moved(base, but=rf"bias|{BLOCKS.get(family, '$^')}")
    before, wanted = outputs(base), outputs(tuned)
    found, _ = loads(family, base, tuned, tmp_path, "kohya")
    assert furthest(before, wanted) > 0.05
    assert furthest(found, wanted) < 1e-5


@pytest.mark.parametrize("family", ["sd15", "flux", "wan", "ltx"])
def test_what_no_file_of_diffusers_holds_is_told_and_is_all_that_is_missing(family, tmp_path):
    torch.manual_seed(0)
    base = FAMILIES[family]()
    tuned = moved(base, torch.nn.Module)
    before = base.state_dict()
    found, report = loads(family, base, tuned, tmp_path, "diffusers")
    told = {row.weight for row in report.rows if row.status == "left out"}
    assert told
    tuned.load_state_dict({name: value for name, value in before.items() if name in told}, strict=False)
    assert furthest(found, outputs(tuned)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_for_comfyui_is_the_fine_tune_with_its_norms_and_biases(family, tmp_path):
    torch.manual_seed(0)
    base = FAMILIES[family]()
    tuned = moved(base, torch.nn.Module)
    folders = saved(base, tuned, tmp_path)
    adapter = extract(*folders, 2048, conv=True, form="peft", dtype=torch.float32)
    adapter.save(tmp_path / "a")
    export(tmp_path / "a", tmp_path / "lora.safetensors", "comfyui", base=folders[0])
    told = {row.weight for row in adapter.report.rows if row.status == "left out"}
    assert all(name.endswith(("scale_shift_table", "_pad_token")) for name in told)  # Of no module, but the model's.
    tuned.load_state_dict({name: value for name, value in base.state_dict().items() if name in told}, strict=False)
    made = open_checkpoint(f"{folders[0]}+{tmp_path / 'lora.safetensors'}")
    base.load_state_dict({name: made.read(name).float() for name in made.headers})
    assert furthest(outputs(base), outputs(tuned)) < 1e-5
