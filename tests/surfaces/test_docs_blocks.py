"""The command lines of pages whose topic has no such test of its own, run where there is what they name."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from peft_posthoc.cli.main import main
from tests.make import architectures, diffusion, models, originals, pipelines, texts

DOCS = Path(__file__).parents[2] / "docs"


def lines_of(page):
    """Its `phlora` lines."""
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("phlora ")]


def run(line):
    _, *arguments = shlex.split(line, comments=True)
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, f"{line}: {done.output}"
    return done.output


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def energy_of(adapter):
    return json.loads((adapter / "phlora_report.json").read_text())["totals"]["energy"]


def clip_text():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=64, max_position_embeddings=16, projection_dim=16, **sizes))


def save_with_tokenizer(pair):
    tokenizer = texts.tokenizer()
    for folder in pair:
        tokenizer.save_pretrained(folder)


def test_serving(here):
    models.save_pair(models.llama(), here)
    run("phlora extract base tuned adapter --rank 4")
    lines = lines_of("serving")
    assert len(lines) == 3
    for line in lines:
        run(line)
    assert (here / "adapter-for-all/adapter_model.safetensors").is_file()


def test_models(here):
    models.save_pair(models.llama(), here)
    tuned = here / "tuned"
    weights = load_file(tuned / "model.safetensors")
    save_file({re.sub("^model", "backbone", name): one for name, one in weights.items()}, tuned / "model.safetensors")
    made = architectures.pair_of("gemma3-images", here / "made")
    for folder, name in zip(made, ("gemma-3", "gemma-3-tuned"), strict=True):
        Path(folder).rename(here / name)
    dry, mapped, served = lines_of("models")
    run(dry)
    assert not (here / "adapter").exists()
    run(mapped)
    assert energy_of(here / "adapter") > 0.5
    run(f"{served} --force")
    config = json.loads((here / "adapter/adapter_config.json").read_text())
    assert not any("vision" in name for name in config["target_modules"])


def test_refine(here):
    """With few and short texts, so that it takes seconds."""
    save_with_tokenizer(models.save_pair(models.llama(vocab_size=96), here))
    run("phlora extract base tuned adapter --rank 2")
    (here / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": one}) for one in texts.PROMPTS))
    (here / "task.txt").write_text("\n".join(texts.PROMPTS))
    refined = [line for line in lines_of("refine") if line.startswith("phlora refine")]
    both, verified = (line for line in lines_of("refine") if line.startswith(("phlora extract", "phlora verify")))
    assert len(refined) == 4
    for line in refined:
        run(f"{line.partition('#')[0]} --sequences 16 --length 16 --passes 1 --force")
    run(f"{both.partition('#')[0]} --sequences 16 --length 16 --passes 1")
    assert json.loads((here / "out/phlora_report.json").read_text())["refined"]
    assert "KL" in run(verified)


def save_single_files(here):
    """Flux and SDXL, with folders of their names."""
    flux, parts = originals.FAMILIES["flux"](), (originals.sdxl(), pipelines.clip(), pipelines.clip(True, width=48))
    flux.save_pretrained(here / "flux1-dev/transformer")
    for name, part in zip(("unet", "text_encoder", "text_encoder_2"), parts, strict=True):
        part.save_pretrained(here / "sdxl" / name)
    for names, change in ((("flux1-dev", "sdxl"), lambda one: one), (("my-flux", "my-sdxl"), diffusion.moved)):
        tensors = originals.under_original_names(change(flux)), originals.sdxl_file(*map(change, parts))
        for name, own in zip(names, tensors, strict=True):
            save_file({key: value.contiguous() for key, value in own.items()}, here / f"{name}.safetensors")


def test_images(here):
    """The first three commands with a UNet: its page says that `unet` is the folder of Stable Diffusion."""
    pytest.importorskip("diffusers")
    save_single_files(here)
    for side in ("base", "tuned"):
        torch.manual_seed(0)
        unet = diffusion.unet()
        (unet if side == "base" else models.tuned_from(unet)).save_pretrained(here / side / "unet")
        (here / side / "transformer").symlink_to("unet")
        torch.manual_seed(0)
        text = clip_text()
        (text if side == "base" else models.tuned_from(text)).save_pretrained(here / side / "text_encoder")
    run("phlora extract base/unet tuned/unet old.safetensors --to kohya --rank 4")
    lines = lines_of("images")
    assert len(lines) == 11
    (checked,) = (line for line in lines if line.startswith("phlora check"))
    for line in lines:
        if line != checked:
            run(line)
    told = CliRunner().invoke(main, shlex.split(checked, comments=True)[1:])
    assert all(engine in told.output.lower() for engine in ("diffusers", "comfyui", "a1111"))
    both = load_file(here / "both.safetensors")
    assert {name.split("_")[1] for name in both} == {"unet", "te"}
    assert all(one.isfinite().all() for one in load_file(here / "my-lora.safetensors").values())
