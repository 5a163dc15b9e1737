"""ComfyUI's files: NVFP4 and MXFP8 with scales in tiles, what is rotated, and 8-bit floats without any scale."""

import json

import pytest
import torch
from safetensors.torch import save_file

from peft_posthoc import CheckpointError, extract
from peft_posthoc.sources import open_checkpoint

E4M3 = torch.float8_e4m3fn
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
M, N = 160, 96


def in_tiles(scales):
    """cuBLAS' order: tiles of 128 rows and 4 columns; in one, row r, column c is at 16 (r % 32) + 4 (r // 32) + c."""
    rows, columns = (-(-side // size) * size for side, size in zip(scales.shape, (128, 4), strict=True))
    tiled = torch.zeros(rows * columns)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            tile = (r // 128) * (columns // 4) + c // 4
            tiled[512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = scales[r, c]
    return tiled.view(rows, columns)


def nvfp4():
    """A layer, and its values: the upper half of a byte is the first of two."""
    codes = torch.randint(0, 256, (M, N // 2), dtype=torch.uint8)
    scales, second = torch.randint(1, 16, (M, N // 16)).float(), torch.tensor(0.125)
    halves = torch.stack([codes >> 4, codes & 15], -1).flatten(1).long()
    values = torch.tensor([*VALUES, *(-value for value in VALUES)])[halves]
    stored = {"weight": codes, "weight_scale": in_tiles(scales).to(E4M3), "weight_scale_2": second}
    return {"format": "nvfp4"}, stored, (values * scales.repeat_interleave(16, 1) * second).bfloat16()


def mxfp8():
    codes, exponents = torch.randn(M, N).to(E4M3), torch.randint(120, 130, (M, N // 32)).float()
    stored = {"weight": codes, "weight_scale": in_tiles(exponents).to(torch.uint8)}
    return {"format": "mxfp8"}, stored, (codes.float() * 2.0 ** (exponents - 127).repeat_interleave(32, 1)).bfloat16()


def saved(path, told, stored, *, where, begin="model.diffusion_model."):
    stored = {f"{begin}x.{leaf}": tensor for leaf, tensor in stored.items()}
    metadata = None
    if where == "beside":
        stored[f"{begin}x.comfy_quant"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    else:
        name = f"{begin}x" if where == "header" else "x"
        metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {name: told}})}
    save_file(stored, path / "model.safetensors", metadata)
    return path / "model.safetensors"


@pytest.mark.parametrize("where", ["header", "header, shorter", "beside"])
@pytest.mark.parametrize("form", [nvfp4, mxfp8], ids=lambda form: form.__name__)
def test_scales_are_taken_out_of_their_tiles(form, where, tmp_path):
    told, stored, wanted = form()
    source = open_checkpoint(saved(tmp_path, told, stored, where=where))
    name = "model.diffusion_model.x.weight"
    assert source.headers == {name: ((M, N), torch.bfloat16)}
    assert torch.equal(source.read(name), wanted)
    assert source.coded_as(name).endswith(told["format"].upper())
    assert (source.steps(name) > 0).all()


@pytest.mark.parametrize("where", ["header", "beside"])
@pytest.mark.parametrize(
    "told",
    [
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
        {"format": "int8_tensorwise", "params": {"convrot": True}},
        {"format": "convrot_w4a4"},
    ],
    ids=str,
)
def test_what_is_rotated_or_unknown_is_refused(told, where, tmp_path):
    stored = {"weight": torch.ones(4, 256, dtype=torch.int8), "weight_scale": torch.ones(4, 1)}
    with pytest.raises(CheckpointError, match=r"`model.diffusion_model.x.weight` in ComfyUI's form `.*`, which is not"):
        open_checkpoint(saved(tmp_path, told, stored, where=where))


def test_plain_integers_of_a_marked_layer_are_scaled(tmp_path):
    stored = {"weight": torch.full((4, 8), 3, dtype=torch.int8), "weight_scale": torch.full((4, 1), 0.5)}
    source = open_checkpoint(saved(tmp_path, {"format": "int8_tensorwise"}, stored, where="beside", begin=""))
    assert source.headers.keys() == {"x.weight"}
    assert (source.read("x.weight") == 1.5).all()


def test_scales_that_fill_no_tiles_are_refused(tmp_path):
    told, stored, _ = nvfp4()
    stored["weight_scale"] = stored["weight_scale"][:128]
    with pytest.raises(CheckpointError, match=r"in NVFP4, and of its scales .*; they would be"):
        open_checkpoint(saved(tmp_path, told, stored, where="header"))


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2])
def test_a_file_that_tells_of_no_scales_holds_its_numbers_themselves(dtype, tmp_path):
    base = torch.randn(48, 32).to(dtype)
    save_file({"x.weight": base, "x.norm.scale": torch.ones(4).to(dtype)}, tmp_path / "base.safetensors")
    source = open_checkpoint(tmp_path / "base.safetensors")
    assert torch.equal(source.read("x.weight"), base.bfloat16())
    assert torch.equal(source.read("x.norm.scale"), torch.ones(4).bfloat16())
    b, a = torch.randn(48, 2), torch.randn(2, 32)
    made = extract(source, {"x.weight": base.float() + b @ a, "x.norm.scale": torch.ones(4)}, rank=2)
    ((_, factors, *_),) = made.layers.values()
    assert torch.allclose(factors.b @ factors.a, b @ a, atol=0.05)
    assert any("FP8 without scales" in note for note in made.report.notes)


def test_scales_that_a_configuration_or_a_mark_tells_of_are_missing(tmp_path):
    codes = {"x.weight": torch.randn(48, 32).to(E4M3)}
    tuned = {"x.weight": torch.randn(48, 32)}
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(codes, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(codes | {"scaled_fp8": torch.empty(0).to(E4M3)}, tmp_path / "marked.safetensors")
    save_file(codes | {"x.scaling": torch.ones(48)}, tmp_path / "odd.safetensors")
    save_file(codes | {"x.scales": torch.ones(48)}, tmp_path / "other.safetensors")
    for base in (codes, folder, *(tmp_path / f"{name}.safetensors" for name in ("marked", "odd", "other"))):
        with pytest.raises(CheckpointError, match=r"quantised .*need their scales"):
            extract(base, tuned, rank=2)
