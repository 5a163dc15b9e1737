"""A diffusers pipeline's components as sources: their files, their classes, and what loads their adapters."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from peft_posthoc import CheckpointError, extract, open_checkpoint
from peft_posthoc.models.layout import GUESSED
from tests.make import diffusion
from tests.make.same import same

WEIGHTS = "diffusion_pytorch_model"


def weights(scale=1.0):
    """Tensors under the names of a diffusers attention block."""
    names = [f"blocks.0.attn.{leaf}.weight" for leaf in ("to_q", "to_k", "to_out.0")]
    return {"conv_in.weight": torch.randn(8, 4, 3, 3)} | {name: scale * torch.randn(8, 8) for name in names}


def component(where, tensors=None, name=WEIGHTS):
    where.mkdir(parents=True, exist_ok=True)
    save_file(weights() if tensors is None else tensors, where / f"{name}.safetensors")
    (where / "config.json").write_text(json.dumps({"_class_name": "NoSuchModel2D", "_diffusers_version": "0.30"}))
    return where


def test_of_the_variants_of_a_component_the_plain_one_is_read(tmp_path):
    plain = weights()
    component(tmp_path, plain)
    for variant in ("fp16", "non_ema"):
        component(tmp_path, weights(scale=9), f"{WEIGHTS}.{variant}")
    assert same(open_checkpoint(tmp_path), plain)


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize("index", [".safetensors.index{}.json", "{}.safetensors.index.json"])
def test_shards_of_a_component_and_of_its_variants_are_found_by_their_index(variant, index, tmp_path):
    tensors, index = weights(), f"{WEIGHTS}{index.format(variant)}"
    placed = {}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        placed[name] = f"{WEIGHTS}{variant}-{number:05}-of-00004.safetensors"
        save_file({name: tensor}, tmp_path / placed[name])
    (tmp_path / index).write_text(json.dumps({"weight_map": placed}))
    assert same(open_checkpoint(tmp_path), tensors)
    (tmp_path / placed["conv_in.weight"]).unlink()
    with pytest.raises(CheckpointError, match="names shards that are not there"):
        open_checkpoint(tmp_path)


def test_a_component_of_pickles_is_read(tmp_path):
    tensors = weights()
    torch.save(tensors, tmp_path / f"{WEIGHTS}.bin")
    assert same(open_checkpoint(tmp_path), tensors)


def test_of_a_pipeline_the_components_to_choose_from_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    component(tmp_path / "pipe/unet")
    component(tmp_path / "pipe/text_encoder", name="model")
    (tmp_path / "pipe/scheduler").mkdir()
    (tmp_path / "pipe/model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    # What the whole pipeline was made from may lie there too, under other names.
    save_file(weights(), tmp_path / "pipe/v1-5.safetensors")
    for given in ("pipe", "pipe/"):
        with pytest.raises(CheckpointError, match=r"pipeline .* Give one of them: `pipe/text_encoder`, `pipe/unet`\.$"):
            open_checkpoint(given)
    assert len(open_checkpoint("pipe/unet").headers) == 4


def test_without_its_class_a_component_goes_by_names_and_shapes(tmp_path):
    base = component(tmp_path / "base")
    before = open_checkpoint(base)
    tuned = component(
        tmp_path / "tuned", {n: before.read(n) + 0.1 * torch.randn(h.shape) for n, h in before.headers.items()}
    )
    found = extract(base, tuned, 4)
    assert found.plan.layout.origin == GUESSED
    found.save(tmp_path / "out")
    targets = json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"]
    # `0` would mean `blocks.0` to PEFT.
    assert targets == ["blocks.0.attn.to_out.0", "to_k", "to_q"]
    assert found.skipped["conv_in.weight"].delta_norm > 0


# With diffusers.


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed.")


def unet(_):
    return diffusion.unet(), (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16))


def transformer(diffusers):
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    ), (torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32), torch.randn(1, 64), torch.tensor([3]))


@pytest.mark.parametrize("form", ["portable", "peft"])
@pytest.mark.parametrize("make", [unet, transformer])
def test_stock_peft_and_diffusers_load_the_adapter_of_a_component(make, form, diffusers, tmp_path):
    import peft

    model, inputs = make(diffusers)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if form == "peft" or parameter.ndim == 2:
                parameter += 0.02 * torch.randn_like(parameter)
    for name, one in (("base", model), ("tuned", tuned)):
        one.save_pretrained(tmp_path / name)
    found = extract(tmp_path / "base", tmp_path / "tuned", 256, form=form)
    assert found.plan.layout.origin == type(model).__name__
    found.save(tmp_path / "out")
    with torch.no_grad():
        before, wanted = (one.eval()(*inputs, return_dict=False)[0] for one in (model, tuned))
        assert (before - wanted).abs().max() > 1e-2
        with warnings.catch_warnings():
            # It gives LoRA's biases to layers that have none, and says so; so does our report.
            warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but the targeted layer")
            by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out").eval()
        torch.testing.assert_close(by_peft(*inputs, return_dict=False)[0], wanted, rtol=1e-4, atol=1e-4)
        if form == "portable":
            model.load_lora_adapter(
                str(tmp_path / "out"), weight_name="adapter_model.safetensors", prefix="base_model.model"
            )
            torch.testing.assert_close(model(*inputs, return_dict=False)[0], wanted, rtol=1e-4, atol=1e-4)
