"""`phlora extract --component` and `--conv-rank`."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from peft_posthoc import extract, open_checkpoint
from peft_posthoc.cli.main import main
from tests.make import diffusion
from tests.make.originals import sdxl, sdxl_file
from tests.make.pipelines import clip

pytest.importorskip("diffusers", reason="diffusers is not installed.", exc_type=ImportError)


@pytest.fixture
def pipelines(tmp_path, monkeypatch):
    """Two folders with a unet, a transformer and a text encoder, every weight of which is moved."""
    monkeypatch.chdir(tmp_path)
    for name, make in (("unet", diffusion.unet), ("transformer", diffusion.sd3), ("text_encoder", clip)):
        model = make()
        tuned = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "base" / name)
        tuned.save_pretrained(tmp_path / "tuned" / name)
    for side in ("base", "tuned"):
        (tmp_path / side / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, ["extract", "base", "tuned", "out", "--quiet", *arguments])


def ranks(folder):
    return json.loads((folder / "adapter_config.json").read_text())["r"]


def test_each_component_has_its_adapter_and_its_rank(pipelines):
    done = run("--component", "unet=8", "--component", "transformer", "--rank", "16")
    assert not done.exit_code, done.output
    assert {name: ranks(pipelines / "out" / name) for name in ("unet", "transformer")} == {"unet": 8, "transformer": 16}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["vae"], "has no folder `vae`"),
        (["unet=0"], "Got `unet=0`"),
        (["unet", "unet=4"], "given twice"),
    ],
)
def test_what_is_no_component_is_refused(given, told, pipelines):
    done = run(*(word for one in given for word in ("--component", one)))
    assert done.exit_code == 2
    assert told in " ".join(done.output.replace("│", " ").split())
    assert not (pipelines / "out").exists()


def test_convolutions_have_a_rank_of_their_own(pipelines):
    adapter = extract(pipelines / "base/unet", pipelines / "tuned/unet", 4, conv_rank=2)
    found = {len(row.shape): row.rank for row in adapter.report.rows if row.rank}
    assert found == {2: 4, 4: 2}
    done = run("--component", "unet", "--rank", "4", "--conv-rank", "2", "--form", "peft")
    assert not done.exit_code, done.output
    config = json.loads((pipelines / "out/unet/adapter_config.json").read_text())
    assert sorted({config["r"], *config["rank_pattern"].values()}) == [2, 4]


@pytest.mark.parametrize(
    ("to", "prefixes"),
    [
        ("diffusers", {"unet.", "text_encoder."}),
        ("kohya", {"lora_unet_", "lora_te_text_"}),
        ("comfyui", {"lora_unet_", "text_encoders.clip_l."}),
    ],
)
def test_several_components_go_into_one_file_each_with_its_rank(to, prefixes, pipelines):
    words = ["--component", "unet=4", "--component", "text_encoder=2", "--include", "attn", "--to", to]
    done = CliRunner().invoke(main, ["extract", "base", "tuned", "x.safetensors", *words])
    assert not done.exit_code, done.output
    assert {"unet", "text_encoder"} <= set(done.output.split())
    tensors = load_file("x.safetensors")
    for prefix in prefixes:
        own = [name for name in tensors if name.startswith(prefix)]
        found = {len(tensors[name]) for name in own if name.endswith(("lora_down.weight", "lora_A.weight"))}
        assert found == ({4} if to == "diffusers" or "unet" in prefix else {2})  # One rank for diffusers.
    assert all(name.startswith(tuple(prefixes)) for name in tensors)


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_two_components_that_a_format_gives_the_same_names_are_refused(to, pipelines):
    words = ["--component", "unet", "--component", "transformer", "--include", "attn", "--to", to]
    done = CliRunner().invoke(main, ["extract", "base", "tuned", "x.safetensors", *words, "--quiet"])
    assert done.exit_code == 1
    assert "have the same names in this format" in done.output
    assert not (pipelines / "x.safetensors").exists()


@pytest.fixture
def single(tmp_path, monkeypatch):
    """A folder of SDXL, and a fine-tune in a single file, both with two text encoders."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = {}
    for name, model in (
        ("unet", sdxl()),
        ("text_encoder", clip()),
        ("text_encoder_2", clip(projection=True, width=48)),
    ):
        model.save_pretrained(tmp_path / "base" / name)
        found[name] = (model, diffusion.moved(model, torch.nn.Linear, but="bias"))
    (tmp_path / "base/model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    for place, side in enumerate(("base", "tuned")):
        save_file(sdxl_file(*(found[name][place] for name in found)), f"{side}.safetensors")
    return found


def test_text_encoders_in_a_single_file_are_components(single, tmp_path):
    words = [word for name in single for word in ("--component", name)]
    words = [
        "base",
        "tuned.safetensors",
        "x.safetensors",
        *words,
        "--rank",
        "64",
        "--to",
        "kohya",
        "--dtype",
        "float32",
    ]
    done = CliRunner().invoke(main, ["extract", *words])
    assert not done.exit_code, done.output
    for name, component in (
        ("text_encoder", "text_encoder"),
        ("text_encoder_2", "text_encoder_2"),
        ("unet", "denoiser"),
    ):
        made = open_checkpoint(f"base/{name}+x.safetensors:{component}")
        wanted = single[name][1].state_dict()
        assert max((made.read(key) - wanted[key]).abs().max() for key in made.headers) < 1e-5, name


@pytest.mark.parametrize(("to", "text"), [("kohya", "lora_te1_text_model_"), ("comfyui", "text_encoders.clip_l.")])
def test_the_first_text_encoder_of_two_single_files_goes_along_and_the_second_is_told(to, text, single):
    files = ["base.safetensors", "tuned.safetensors", "x.safetensors"]
    words = ["extract", *files, "--to", to, "--rank", "4", "--exclude", "embedders.1"]
    done = CliRunner().invoke(main, words)
    assert not done.exit_code, done.output
    assert any(name.startswith(text) for name in load_file("x.safetensors"))
    words = ["extract", *files, "--to", to, "--rank", "4", "--include", "embedders.1", "--force"]
    assert "conditioner.embedders.1.model" in CliRunner().invoke(main, words).output
