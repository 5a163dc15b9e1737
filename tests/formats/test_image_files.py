"""Exports for diffusers, ComfyUI and kohya's scripts: read back they are the adapter; diffusers reads them too."""

import pytest
import torch

from peft_posthoc import export, extract, open_checkpoint
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
