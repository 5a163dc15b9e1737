"""LoHa and LoKr: what base + file adds is what LyCORIS says, and it can be extracted from."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import AdapterError, export, extract, open_checkpoint
from peft_posthoc.adapters.open import open_adapter
from tests.make import diffusion

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.1.resnets.0.conv1"


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    diffusion.unet().save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def loha(m, n):
    parts = {"hada_w1_a": (m, 2), "hada_w1_b": (2, n), "hada_w2_a": (m, 2), "hada_w2_b": (2, n)}
    own = {name: torch.randn(shape) for name, shape in parts.items()}
    return own, (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"]), 2


def lokr(m, n):
    own = {"lokr_w1": torch.randn(2, 2), "lokr_w2_a": torch.randn(m // 2, 4), "lokr_w2_b": torch.randn(4, n // 2)}
    return own, torch.kron(own["lokr_w1"], own["lokr_w2_a"] @ own["lokr_w2_b"]), 4


def lokr_whole(m, n):
    own = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(m // 2, n // 2)}
    return own, torch.kron(own["lokr_w1"], own["lokr_w2"]), None  # Its alpha says nothing.


def saved(base, module, make, folder):
    """A file with one module, and what it adds."""
    shape = open_checkpoint(base).headers[f"{module}.weight"].shape
    tensors, delta, rank = make(shape[0], torch.Size(shape[1:]).numel())
    key = f"lora_unet_{module.replace('.', '_')}"
    tensors = {f"{key}.{name}": value for name, value in tensors.items()} | {f"{key}.alpha": torch.tensor(3.0)}
    save_file(tensors, folder / "lycoris.safetensors")
    return folder / "lycoris.safetensors", (delta * (3 / rank if rank else 1)).reshape(shape)


@pytest.mark.parametrize("module", [LINEAR, CONV])
@pytest.mark.parametrize("make", [loha, lokr, lokr_whole])
def test_base_and_file_are_the_base_with_its_delta(make, module, base, tmp_path):
    file, delta = saved(base, module, make, tmp_path)
    before, after = open_checkpoint(base), open_checkpoint(f"{base}+{file}")
    name = f"{module}.weight"
    torch.testing.assert_close(after.read(name).float() - before.read(name), delta, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.read("conv_in.weight").float(), before.read("conv_in.weight"))


def test_a_loha_can_be_extracted_from_and_written_as_a_difference(base, tmp_path):
    file, delta = saved(base, LINEAR, loha, tmp_path)
    adapter = extract(base, f"{base}+{file}", 4, dtype=torch.float32)
    (row,) = (row for row in adapter.report.rows if row.rank and row.delta_norm)
    spectrum = torch.linalg.svdvals(delta) ** 2
    assert row.energy == pytest.approx(float(spectrum[:4].sum() / spectrum.sum()), rel=1e-4)
    export(file, tmp_path / "again.safetensors", "comfyui", base=base)
    ((name, found),) = load_file(tmp_path / "again.safetensors").items()
    assert name.endswith("to_q.diff")
    torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-5)


def test_what_is_more_than_a_product_is_refused(base, tmp_path):
    file, _ = saved(base, LINEAR, loha, tmp_path)
    key = f"lora_unet_{LINEAR.replace('.', '_')}"
    for more, told in (("dora_scale", "is DoRA"), ("hada_t1", "is LoHa in Tucker's form")):
        save_file(load_file(file) | {f"{key}.{more}": torch.ones(2, 2)}, tmp_path / "more.safetensors")
        with pytest.raises(AdapterError, match=told):
            open_adapter(tmp_path / "more.safetensors")
