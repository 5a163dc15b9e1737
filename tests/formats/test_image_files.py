"""Exports for diffusers, ComfyUI and kohya's scripts: read back they are the adapter; diffusers reads them too."""

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

from peft_posthoc import AdapterError, export, extract, open_checkpoint
from peft_posthoc.cli.main import main
from tests.make import diffusion

FORMATS = ("diffusers", "comfyui", "kohya")
MODELS = {"unet": diffusion.unet, "sd3": diffusion.sd3, "flux": diffusion.flux}


def save_pair(model, folder, name, *, norms=False, seed=1):
    """A component's folder, and that of the same with other weights."""
    torch.manual_seed(seed)
    model.save_pretrained(folder / "base" / name)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if norms or (weight.ndim == 2 and "norm_out" not in key):
                weight += 0.05 * torch.randn_like(weight)
    model.save_pretrained(folder / "tuned" / name)
    return folder / "base" / name, folder / "tuned" / name


def distance(one, other):
    """The largest difference of two checkpoints' tensors."""
    one, other = (open_checkpoint(str(source)) for source in (one, other))
    assert one.headers.keys() == other.headers.keys()
    return max((one.read(n).double() - other.read(n).double()).abs().max().item() for n in one.headers)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_written_adds_the_same_when_it_is_read_again(kind, to, tmp_path):
    include = r"\.(attn|ff)\." if (kind, to) == ("sd3", "kohya") else ()
    base, tuned = save_pair(MODELS[kind](), tmp_path, "unet" if kind == "unet" else "transformer")
    extract(base, tuned, 64, dtype=torch.float32, form="peft", include=include, exclude=r"norm|bias").save(
        tmp_path / "a"
    )
    file = tmp_path / "lora.safetensors"
    export(tmp_path / "a", file, to, base=base)
    assert distance(f"{base}+{file}", f"{base}+{tmp_path / 'a'}") < 1e-5


def test_extracted_straight_away_it_is_the_fine_tune_and_the_same_bytes_again(tmp_path):
    base, tuned = save_pair(diffusion.unet(), tmp_path, "unet", norms=True)
    file = tmp_path / "lora.safetensors"
    line = ["extract", base, tuned, file, "--to", "comfyui", "--rank", "256", "--conv", "--dtype", "float32", "--quiet"]
    assert CliRunner().invoke(main, [*map(str, line)]).exit_code == 0
    assert distance(f"{base}+{file}", tuned) < 1e-5
    before = file.read_bytes()
    refused = CliRunner().invoke(main, [*map(str, line)])
    assert refused.exit_code == 1
    assert "exists" in refused.stderr
    assert CliRunner().invoke(main, [*map(str, line), "--force"]).exit_code == 0
    assert file.read_bytes() == before
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    assert (said["ss_network_module"], said["ss_network_dim"]) == ("networks.lora", "32")
    save_file({"x": torch.ones(1)}, file)
    refused = CliRunner().invoke(main, [*map(str, line), "--force"])
    assert "is no earlier export" in refused.stderr


def test_each_kind_of_place_and_component_is_told(tmp_path):
    base, tuned = save_pair(diffusion.unet(), tmp_path, "unet")
    extract(base, tuned, 2, include="attn1").save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"writes one file, NAME\.safetensors"):
        export(tmp_path / "a", tmp_path / "folder", "kohya", base=base)
    with pytest.raises(ValueError, match="has not"):
        export(tmp_path / "a", tmp_path / "x", "merged", base=base, beside=[tmp_path / "a"])
    with pytest.raises(AdapterError, match="are for the same component, `unet`"):
        export(tmp_path / "a", tmp_path / "x.safetensors", "kohya", base=base, beside=[f"{base}+{tmp_path / 'a'}"])
