"""What models of diffusers compute with our files: what the fine-tune computes, or what is told to be left out."""

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from peft_posthoc import export, extract, open_checkpoint
from peft_posthoc.cli.main import main
from tests.make import pipelines
from tests.make.diffusion import moved, outputs
from tests.make.originals import FAMILIES, under_original_names

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


def extracted(family, folder, to, *options):
    """A model, its outputs once tuned, and what the command line says of two single files of them."""
    torch.manual_seed(0)
    base = FAMILIES[family](**({"layers_per_block": 2} if family == "sd15" else {}))
    tuned = moved(base, torch.nn.Linear, but=r"bias|_embed")
    saved(base, tuned, folder)
    for name, model in (("base", base), ("tuned", tuned)):
        tensors = {key: value.contiguous() for key, value in under_original_names(model).items()}
        save_file(tensors, folder / f"{name}.safetensors")
    place = folder / ("unet" if to == "kohya" else "transformer") / "lora.safetensors"
    place.parent.mkdir()
    words = [folder / "base.safetensors", folder / "tuned.safetensors", place, "--to", to, "--rank", "64"]
    words = ["extract", *words, "--dtype", "float32", *options]
    return base, outputs(tuned), place, CliRunner().invoke(main, [*map(str, words)])


@pytest.mark.parametrize(("family", "called"), [("sd15", "down_blocks_1_attentions_0"), ("sdxl", "input_blocks_4_1")])
def test_two_single_files_make_a_file_of_kohya_that_diffusers_loads(family, called, tmp_path):
    base, wanted, place, done = extracted(family, tmp_path, "kohya")
    assert not done.exit_code, done.output
    assert any(f"lora_unet_{called}_transformer_blocks_0_attn1_to_q." in name for name in load_file(place))
    assert furthest(outputs(loaded(family, base, place)), wanted) < 1e-5


def test_two_single_files_make_a_file_of_diffusers_by_the_folder_of_their_class(tmp_path):
    base, wanted, place, done = extracted(
        "flux", tmp_path, "diffusers", "--serve-as", tmp_path / "base" / "transformer"
    )
    assert not done.exit_code, done.output
    assert furthest(outputs(loaded("flux", base, place)), wanted) < 1e-5


def test_of_two_single_files_alone_diffusers_names_are_asked_for(tmp_path):
    *_, place, done = extracted("flux", tmp_path, "diffusers")
    assert done.exit_code == 1
    assert "`--serve-as FOLDER`" in done.output
    assert not place.exists()
