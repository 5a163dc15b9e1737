"""What is saved is what is claimed: the same product but for rounding, or a refusal that names the layer."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import AdapterError, combine, export, extract, resize
from peft_posthoc.adapters.cast import _held, _only_rounded, cast, cast_biases
from peft_posthoc.serving.fix import fix
from tests.make import models
from tests.make.spectra import with_spectrum

TYPES = [torch.float32, torch.bfloat16, torch.float16]
PREFIX = "base_model.model.layers.0.proj"


def factors(scale, *, m=24, n=16, rank=4):
    """Balanced factors of a product of about this size."""
    return scale**0.5 * torch.randn(rank, n), scale**0.5 * torch.randn(m, rank)


def distance(a, b, other_a, other_b):
    """Between two products, against the first one."""
    wanted = b.double() @ a.double()
    return float((other_b.double() @ other_a.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [*TYPES, torch.float8_e4m3fn])
@pytest.mark.parametrize("scale", [1e-2, 1.0])
def test_ordinary_factors_are_rounded_and_no_more(dtype, scale):
    a, b = factors(scale)
    saved = cast(a, b, dtype, "layer")
    assert torch.equal(saved[0].float(), a.to(dtype).float())
    assert torch.equal(saved[1].float(), b.to(dtype).float())


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_padded_is_zero_and_shares_no_memory(dtype):
    a, b = factors(1.0)
    saved_a, saved_b = cast(a, b, dtype, "layer", rank=8)
    assert (saved_a.shape, saved_b.shape) == ((8, 16), (24, 8))
    assert torch.equal(saved_a[:4], a.to(dtype))
    assert torch.equal(saved_b[:, :4], b.to(dtype))
    assert not saved_a[4:].any()
    assert not saved_b[:, 4:].any()
    assert cast(a, b, torch.float32, "layer")[0].data_ptr() != a.data_ptr()


@pytest.mark.parametrize("side", [0, 1])
def test_a_pair_out_of_balance_is_moved_by_powers_of_two(side):
    # One factor is below all that float16 holds, the other one large: their product is ordinary.
    pair = list(factors(1.0))
    pair[side], pair[1 - side] = pair[side] * 2.0**-30, pair[1 - side] * 2.0**12
    assert not pair[side].half().any()
    saved = cast(*pair, torch.float16, "layer")
    assert distance(*pair, *saved) <= 2 * torch.finfo(torch.float16).eps
    # Exact but for one rounding: each row is the wanted one times a power of two.
    rows = saved[0].double().norm(dim=1) / pair[0].double().norm(dim=1)
    assert torch.allclose(rows.log2(), rows.log2().round(), atol=1e-3)


def test_a_single_entry_against_a_wide_row_finds_the_balance_too():
    # Of one changed row: `b` has one entry of sqrt(sigma), `a` thousands that share the same norm.
    a = torch.full((1, 4096), 3.3e-7)
    b = torch.zeros(8, 1)
    b[3] = 2e-2
    assert distance(a, b, a.half(), b.half()) > 0.05
    assert distance(a, b, *cast(a, b, torch.float16, "layer")) <= 2 * torch.finfo(torch.float16).eps


def test_a_product_that_the_type_has_no_pair_for_is_refused():
    a, b = factors(1e-16)
    with pytest.raises(AdapterError, match=r"`layer` are too small for torch\.float16.*Choose another `dtype=\.\.\.`"):
        cast(a, b, torch.float16, "layer")
    for dtype in (torch.bfloat16, torch.float32):
        assert distance(a, b, *cast(a, b, dtype, "layer")) <= 2 * torch.finfo(dtype).eps


def test_what_is_lost_of_a_triplet_counts_as_much_as_the_triplet():
    # The last triplet is a billionth of the first, and nothing in float16: no more is lost than by rounding the first.
    a, b = factors(1.0)
    a[3] *= 1e-9
    saved = cast(a, b, torch.float16, "layer")
    assert torch.equal(saved[0], a.half())
    assert distance(a, b, *saved) <= 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_an_overflow_is_refused_by_name(dtype):
    a, b = factors(1e12)
    with pytest.raises(AdapterError, match=r"`layer` overflow torch"):
        cast(a, b, dtype, "layer")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_the_quick_look_never_passes_what_the_type_does_not_hold(dtype):
    said = []
    for power in range(-30, 3):
        for spread in (0.0, 3.0, 8.0):  # powers of ten between entries
            a, b = (torch.randn(5, 40) * 10 ** (spread * torch.rand(5, 40) - spread) * 10.0**power for _ in range(2))
            quick = _only_rounded(a, b.mT, dtype)
            held = _held(a, b.mT, a.to(dtype), b.mT.to(dtype))
            said.append((quick, held))
    assert (True, False) not in said
    assert (True, True) in said
    assert (False, False) in said or dtype is torch.bfloat16  # It has the range of float32.


def test_zeros_are_zeros_in_every_type():
    for dtype in (*TYPES, torch.float64, torch.float8_e4m3fn):
        saved = cast(torch.zeros(2, 3), torch.randn(4, 2), dtype, "layer")
        assert not saved[0].float().any()


def test_biases_are_held_or_refused():
    held = cast_biases({"q": torch.tensor([1.0, 1e-9]), "k": torch.tensor([1e-9])}, torch.float16)
    assert torch.equal(held["q"], torch.tensor([1.0, 0.0]).half())
    assert not held["k"].any()
    with pytest.raises(AdapterError, match="biases are too small"):
        cast_biases({"k": torch.tensor([1e-9])}, torch.float16)
    with pytest.raises(AdapterError, match="bias of `q` overflows"):
        cast_biases({"q": torch.tensor([1e9])}, torch.float16)
    assert cast_biases({}, torch.float16) == {}


# The surfaces.


def pair(scale):
    base = {"layers.0.proj.weight": torch.zeros(24, 16)}
    delta = with_spectrum(24, 16, scale * 0.5 ** torch.arange(16.0), seed=0).float()
    return base, {"layers.0.proj.weight": delta}


def stored(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    return weights[f"{PREFIX}.lora_A.weight"], weights[f"{PREFIX}.lora_B.weight"]


@pytest.mark.parametrize("form", ["portable", "peft"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e-7, 1e-5, 1.0])
def test_the_energy_that_is_claimed_is_in_the_file_or_there_is_none(scale, dtype, form, tmp_path):
    base, tuned = pair(scale)
    adapter = extract(base, tuned, 4, dtype=dtype, form=form)
    if dtype is torch.float16 and scale < 1e-8:
        with pytest.raises(AdapterError, match=r"`layers\.0\.proj` are too small for torch\.float16"):
            adapter.save(tmp_path / "out")
        assert not list(tmp_path.iterdir())
        return
    adapter.save(tmp_path / "out")
    a, b = (x.double() for x in stored(tmp_path / "out"))
    delta = tuned["layers.0.proj.weight"].double()
    held = 1 - float((delta - b @ a).square().sum() / delta.square().sum())
    claimed = json.loads((tmp_path / "out" / "phlora_report.json").read_text())["totals"]["energy"]
    assert abs(held - claimed) <= 8 * torch.finfo(dtype).eps


def adapter_of(tmp_path, a, b, **config):
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({f"{PREFIX}.lora_A.weight": a, f"{PREFIX}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": len(a), "lora_alpha": len(a), "target_modules": ["proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def by_resize(adapter, out):
    resize(adapter, 8, dtype=torch.float16).save(out)


def by_combine(adapter, out):
    combine([adapter, adapter], [0.5, 0.5], dtype=torch.float16).save(out)


def by_fix(adapter, out):
    assert fix(adapter, out, dtype=torch.float16).rounding <= torch.finfo(torch.float16).eps


@pytest.mark.parametrize("write", [by_resize, by_combine, by_fix])
def test_an_adapter_out_of_balance_is_brought_into_it(write, tmp_path):
    a, b = 1e3 * torch.randn(8, 16), 1e-8 * torch.randn(24, 8)
    write(adapter_of(tmp_path, a, b), tmp_path / "out")
    assert distance(a, b, *stored(tmp_path / "out")) <= 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("write", [by_resize, by_combine, by_fix])
def test_an_adapter_too_small_for_the_type_is_refused(write, tmp_path):
    adapter = adapter_of(tmp_path, torch.randn(8, 16), 1e-15 * torch.randn(24, 8))
    with pytest.raises(AdapterError, match=r"`layers\.0\.proj` are too small for torch\.float16"):
        write(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("to", "file"), [("mlx", "adapters.safetensors"), ("vllm-moe", "adapter_model.safetensors")])
def test_exports_see_it_too(to, file, tmp_path):
    models.save_pair(models.mixtral(), tmp_path)
    extract(tmp_path / "base", tmp_path / "tuned", 2, experts="fused").save(tmp_path / "adapter")
    where = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(where)
    save_file({n: 1e3 * t if "lora_A" in n else 1e-9 * t for n, t in tensors.items()}, where)
    made = export(tmp_path / "adapter", tmp_path / "out", to, base=str(tmp_path / "base"), dtype=torch.float16)
    assert all(tensor.any() for tensor in load_file(tmp_path / "out" / file).values())
    assert made.dtype == "float16"
    save_file({n: 1e-9 * t for n, t in tensors.items()}, where)
    with pytest.raises(AdapterError, match=r"too small for torch\.float16"):
        export(tmp_path / "adapter", tmp_path / "none", to, base=str(tmp_path / "base"), dtype=torch.float16)
    assert not (tmp_path / "none").exists()


def test_a_type_that_holds_no_fractions_is_refused():
    with pytest.raises(ValueError, match=r"saved in a floating type. Got `dtype=int8`"):
        extract(*pair(1.0), 4, dtype=torch.int8)
