"""GGUF files read under their own names: every type that `gguf` decodes, files in parts, and damaged ones."""

import os

import gguf
import numpy as np
import pytest
import torch

from peft_posthoc import CheckpointError
from peft_posthoc.checkpoints.gguf import Gguf
from peft_posthoc.checkpoints.gguf_steps import beside
from tests.make import gguf_files, models

QUANT = gguf.GGMLQuantizationType
PLAIN = {
    QUANT.F64: torch.float64,
    QUANT.F32: torch.float32,
    QUANT.F16: torch.float16,
    QUANT.BF16: torch.bfloat16,
    QUANT.I8: torch.int8,
    QUANT.I16: torch.int16,
    QUANT.I32: torch.int32,
    QUANT.I64: torch.int64,
}
QUANTISED = [kind for kind in QUANT if kind not in PLAIN and hasattr(gguf.quants, kind.name)]


def written(path, tensors):
    """A file of tensors as they are stored: by name, their bytes and their type."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (stored, kind) in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind, rows):
    """Rows of three blocks, of which no number is decoded at a time; of any bits but infinities."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    return np.random.default_rng(0).integers(0, 60, (rows, 3 * size), dtype=np.uint8)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Of any bits some scales are no numbers.
@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_every_type_is_decoded_as_gguf_does_to_the_last_bit(kind, tmp_path):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 256, (1 + 2 * (1 << 19) // block // 3, 3 * size), dtype=np.uint8)
    file = Gguf(written(tmp_path / "a.gguf", {"w.weight": (stored, kind)}), label="a")
    found, wanted = file.read("w.weight"), gguf.dequantize(stored, kind).astype(np.float32)
    assert (file.types["w.weight"], file.headers["w.weight"].dtype) == (kind.name, torch.float32)
    assert file.headers["w.weight"].shape == tuple(found.shape) == wanted.shape
    numbers = ~np.isnan(wanted)
    assert numbers.mean() > 0.5
    assert np.array_equal(~np.isnan(found.numpy()), numbers)
    assert found.numpy()[numbers].tobytes() == wanted[numbers].tobytes()


CODEBOOKS = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0"}


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_steps_lead_to_the_values_beside(kind, tmp_path):
    """To the next code of a grid; of codebooks, whose codes stand for several values, they are told from the values."""
    stored = random_blocks(kind, 64)
    file = Gguf(written(tmp_path / "a.gguf", {"w.weight": (stored, kind)}), label="a")
    steps, values = file.steps("w.weight"), file.read("w.weight")
    assert (steps.shape, steps.dtype) == (values.shape, torch.float32)
    assert (beside(stored, kind) is None) == (kind.name in CODEBOOKS)
    assert (steps >= 0).all()
    assert steps.mean() > 0
    # Where two values that share a scale differ, they do by at least a step of one of them.
    few, own = values.view(-1, 16), steps.view(-1, 16)
    apart = (few[:, :, None] - few[:, None, :]).abs()
    least = torch.minimum(own[:, :, None], own[:, None, :])
    assert ((apart == 0) | (apart >= 0.9 * least)).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
def test_steps_tell_the_error_of_quantising(kind, tmp_path):
    kind, values = QUANT[kind], np.random.default_rng(0).standard_normal((64, 512), dtype=np.float32)
    stored = gguf.quantize(values, kind)
    file = Gguf(written(tmp_path / "a.gguf", {"w.weight": (stored, kind)}), label="a")
    error = (file.read("w.weight") - torch.from_numpy(values)).square().mean()
    assert file.steps("w.weight").square().mean() / 12 == pytest.approx(float(error), rel=0.3)


def test_many_types_are_among_them():
    """Of those in use, each: a new one of the package is read as soon as it decodes it."""
    assert {"Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"} <= {kind.name for kind in QUANTISED}
    assert {"IQ4_NL", "IQ4_XS", "IQ3_S", "IQ2_XXS", "IQ1_M", "MXFP4", "NVFP4"} <= {kind.name for kind in QUANTISED}


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
def test_plain_numbers_are_themselves(kind, tmp_path):
    wanted = (8 * torch.randn(3, 7, 5)).to(PLAIN[kind])
    stored = wanted.view(torch.uint8).numpy() if kind is QUANT.BF16 else wanted.numpy()
    found = Gguf(written(tmp_path / "a.gguf", {"w": (stored, kind)}), label="a")
    assert found.headers["w"] == (wanted.shape, wanted.dtype)
    assert torch.equal(found.read("w"), wanted)


def test_a_type_that_gguf_does_not_decode_is_refused(tmp_path):
    stored = random_blocks(QUANT.Q8_K, 2)
    path = written(tmp_path / "a.gguf", {"w.weight": (stored, QUANT.Q8_K)})
    with pytest.raises(CheckpointError, match=r"holds `w.weight` as Q8_K, which the installed gguf does not decode"):
        Gguf(path, label="a")


def test_of_several_files_any_opens_all(tmp_path):
    whole = Gguf(gguf_files.save(models.llama(), tmp_path / "whole.gguf", "llama"), label="whole")
    wanted = {name: whole.read(name).clone() for name in whole.headers}
    parts = gguf_files.split(tmp_path / "whole.gguf")
    for part in parts:
        found = Gguf(part, label="parts")
        assert found.metadata["llama.block_count"] == 2
        assert found.headers == whole.headers
        assert all(torch.equal(found.read(name), wanted[name]) for name in wanted)
    parts[0].unlink()
    with pytest.raises(
        CheckpointError, match=r"is one of 2 files of a model; beside it is no whole-00001-of-00002\.gguf"
    ):
        Gguf(parts[1], label="parts")


def test_what_is_damaged_or_changes_is_told_in_a_line(tmp_path):
    path = gguf_files.save(models.llama(), tmp_path / "a.gguf", "llama")
    good = path.read_bytes()
    for bad in (b"", b"GGUF", b"no such thing at all", good[:100], good[:-5000], good[:40] + b"\xff" * 60 + good[100:]):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"`.*a\.gguf` is not a readable GGUF file"):
            Gguf(path, label="a")
    path.write_bytes(good)
    file = Gguf(path, label="a")
    os.utime(path, ns=(0, 0))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        file.read("output_norm.weight")


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    import sys

    from peft_posthoc import MissingExtraError

    path = gguf_files.save(models.llama(), tmp_path / "a.gguf", "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'peft-posthoc\[quantised\]'"):
        Gguf(path, label="a")
