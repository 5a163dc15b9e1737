"""Single files under original names: seen as diffusers has the model, as they are compared, and as they are."""

import copy
import math

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from peft_posthoc import extract, open_checkpoint
from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.memory import InMemory
from peft_posthoc.cli.main import main
from peft_posthoc.models.original import as_component, learned
from tests.make.original_names import originals
from tests.make.originals import FAMILIES, PREFIX, under_original_names
from tests.make.same import same

pytest.importorskip("diffusers", reason="diffusers is not installed.", exc_type=ImportError)
EPS = torch.finfo(torch.float32).eps


def config_of(model):
    return {"_class_name": type(model).__name__, **model.config}


def pair_of(family):
    """A model, and the same with every linear layer moved."""
    base = FAMILIES[family]()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for module in tuned.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight += 0.02 * torch.randn_like(module.weight)
    return base, tuned


def written(folder, model, name, *, beside=None):
    """The model as a folder of diffusers and as a single file."""
    model.save_pretrained(folder / name)
    file = folder / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in (under_original_names(model) | (beside or {})).items()}, file)
    return folder / name, file


def factors_of(out):
    return load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_has_the_tensors_of_the_class_to_the_last_bit(family, prefix):
    model = FAMILIES[family]()
    tensors = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    file = InMemory(under_original_names(model, tensors, prefix), label="file")
    assert same(as_component(file, config_of(model)), tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_and_folders_give_the_same_adapter_and_diffusers_makes_the_tuned_model_of_it(family, tmp_path):
    base, tuned = pair_of(family)
    before, after = written(tmp_path, base, "base"), written(tmp_path, tuned, "tuned")
    wanted = extract(before[0], after[0], 2048).save(tmp_path / "folders")
    found = {
        "file of a folder": extract(before[0], after[1], 2048),
        "two files": extract(before[1], after[1], 2048, serve_as=str(before[0])),
    }
    for name, adapter in found.items():
        assert adapter.plan.layout.origin == type(base).__name__
        made, stock = factors_of(adapter.save(tmp_path / name)), factors_of(wanted)
        assert made.keys() == stock.keys()
        assert all(torch.equal(made[one], stock[one]) for one in stock), name
    base.load_lora_adapter(
        str(tmp_path / "two files"), weight_name="adapter_model.safetensors", prefix="base_model.model"
    )
    base.fuse_lora()
    base.unload_lora()
    for name, value in tuned.state_dict().items():
        assert (base.state_dict()[name] - value).abs().max() <= 64 * EPS * max(1, value.abs().max()), name


def test_what_else_is_in_the_file_is_told(tmp_path):
    base, tuned = pair_of("sd15")
    vae = {"first_stage_model.decoder.conv_in.weight": torch.randn(4, 4)}
    folder, _ = written(tmp_path, base, "base")
    _, file = written(tmp_path, tuned, "tuned", beside=vae)
    report = extract(folder, file, 4).report
    assert [row.weight for row in report.rows if row.weight in vae] == [*vae]


def test_two_files_alone_keep_their_names_and_a_fused_matrix_is_factored_as_one(tmp_path):
    base, tuned = pair_of("flux")
    (_, before), (_, after) = written(tmp_path, base, "base"), written(tmp_path, tuned, "tuned")
    adapter = extract(before, after, 8)
    names = {row.weight for row in adapter.report.rows if row.rank}
    fused = f"{PREFIX}double_blocks.0.img_attn.qkv.weight"
    assert fused in names
    name = "transformer_blocks.0.attn.to_{}.weight"
    deltas = [tuned.state_dict()[name.format(one)] - base.state_dict()[name.format(one)] for one in "qkv"]
    spectrum = torch.linalg.svdvals(torch.cat(deltas)) ** 2
    row = next(row for row in adapter.report.rows if row.weight == fused)
    assert row.energy == pytest.approx(float(spectrum[:8].sum() / spectrum.sum()), rel=1e-4)


def test_two_files_alone_make_a_file_for_comfyui_of_the_fused_matrices(tmp_path):
    base, tuned = pair_of("hunyuan-video")
    (_, before), (_, after) = written(tmp_path, base, "base"), written(tmp_path, tuned, "tuned")
    out = tmp_path / "lora.safetensors"
    words = ["extract", str(before), str(after), str(out), "--to", "comfyui", "--rank", "64", "--dtype", "float32"]
    done = CliRunner().invoke(main, words)
    assert not done.exit_code, done.output
    lora, (one, other) = load_file(out), (under_original_names(model) for model in (base, tuned))
    fused = "single_blocks.0.linear1"
    made = lora[f"diffusion_model.{fused}.lora_up.weight"] @ lora[f"diffusion_model.{fused}.lora_down.weight"]
    made = made * lora[f"diffusion_model.{fused}.alpha"] / len(lora[f"diffusion_model.{fused}.lora_down.weight"])
    wanted = other[f"{PREFIX}{fused}.weight"] - one[f"{PREFIX}{fused}.weight"]
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


def test_scaled_8_bit_floats_in_a_file_are_decoded_first(tmp_path):
    base, tuned = pair_of("flux2")
    folder, _ = written(tmp_path, base, "base")
    stored, decoded = {}, {}
    for name, value in under_original_names(tuned).items():
        stored[name] = decoded[name] = value.contiguous()
        if value.ndim == 2 and "_blocks." in name:
            scale = value.abs().max() / 448
            stored[name] = (value / scale).to(torch.float8_e4m3fn)
            stored[f"{name.removesuffix('weight')}weight_scale"] = scale
            decoded[name] = stored[name].float() * scale
    save_file(stored, tmp_path / "fp8.safetensors")
    seen = as_component(open_checkpoint(tmp_path / "fp8.safetensors"), config_of(base))
    wanted = as_component(InMemory(decoded, label="decoded"), config_of(base))
    key = "transformer_blocks.0.attn.to_k.weight"
    assert seen.steps(key).shape == seen.read(key).shape
    for name in wanted.headers:
        torch.testing.assert_close(seen.read(name).float(), wanted.read(name), rtol=2**-8, atol=0)
    rows = extract(folder, tmp_path / "fp8.safetensors", 8).report.rows
    assert next(row for row in rows if row.weight == key).rank == 8


def test_the_file_of_another_model_is_left_as_it_is():
    file = InMemory(under_original_names(FAMILIES["wan"]()), label="file")
    assert as_component(file, config_of(FAMILIES["flux"]())) is file


@pytest.mark.parametrize("family", ["flux", "hunyuan-video"])
def test_real_widths_are_learned_without_any_memory(family):
    import diffusers

    small = FAMILIES[family]()
    with torch.device("meta"):
        config = dict(small.config) | {"num_attention_heads": 24, "attention_head_dim": 128}
        config |= {"axes_dims_rope": (16, 56, 56)} if family == "flux" else {"rope_axes_dim": (16, 56, 56)}
        model = getattr(diffusers, type(small).__name__).from_config(config)
    headers = {name: Header(tuple(one.shape), one.dtype) for name, one in model.state_dict().items()}
    files = {name: piece.header for name, piece in originals(type(model).__name__, headers).items()}
    assert math.prod(files["single_blocks.0.linear1.weight"].shape) == 7 * 3072 * 3072
    made = learned(files, config_of(model))
    assert {name: piece.header for name, piece in made.items()} == headers
