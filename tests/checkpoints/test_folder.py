"""Folders and files of weights of every format, read one tensor at a time."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft_posthoc import CheckpointError, extract, open_checkpoint
from peft_posthoc.checkpoints import folder, model_files
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from tests.make import models
from tests.make.same import same


def one_safetensors(tensors, where):
    save_file(tensors, where / "model.safetensors")


def sharded_safetensors(tensors, where):
    shard(tensors, where, "model", "safetensors", save_file)


def oddly_named_safetensors(tensors, where):
    names = list(tensors)
    save_file({name: tensors[name] for name in names[::2]}, where / "weights_b.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, where / "weights_a.safetensors")


def oddly_named_index(tensors, where):
    shard(tensors, where, "diffusion", "safetensors", save_file)


def one_bin(tensors, where):
    torch.save(tensors, where / "pytorch_model.bin")


def one_legacy_bin(tensors, where):
    torch.save(tensors, where / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def one_bin_of_parameters(tensors, where):
    torch.save({name: as_parameter(tensor) for name, tensor in tensors.items()}, where / "pytorch_model.bin")


def one_bin_of_pickle_protocol_3(tensors, where):
    torch.save(tensors, where / "pytorch_model.bin", pickle_protocol=3)


def sharded_bin(tensors, where):
    shard(tensors, where, "pytorch_model", "bin", torch.save)


def sharded_legacy_bin(tensors, where):
    def save(part, path):
        torch.save(part, path, _use_new_zipfile_serialization=False)

    shard(tensors, where, "pytorch_model", "bin", save)


def shard(tensors, where, stem, suffix, save):
    names = list(tensors)
    weight_map = {}
    for i in range(3):
        file = f"{stem}-{i + 1:05}-of-00003.{suffix}"
        weight_map |= dict.fromkeys(names[i::3], file)
        save({name: tensors[name] for name in names[i::3]}, where / file)
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (where / f"{stem}.{suffix}.index.json").write_text(json.dumps(content))


def as_parameter(tensor):
    return nn.Parameter(tensor) if tensor.is_floating_point() else tensor


FORMATS = [
    one_safetensors,
    sharded_safetensors,
    oddly_named_safetensors,
    oddly_named_index,
    one_bin,
    one_legacy_bin,
    one_bin_of_parameters,
    one_bin_of_pickle_protocol_3,
    sharded_bin,
    sharded_legacy_bin,
]


@pytest.mark.parametrize("suffix", model_files.SUFFIXES)
def test_a_single_file_is_a_checkpoint_without_a_configuration(suffix, weights, tmp_path):
    path = tmp_path / f"any-name{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, Checkpoint)
    assert same(checkpoint, weights)
    assert (checkpoint.label, checkpoint.config, checkpoint.folder) == (str(path), None, None)
    before = checkpoint.identity
    assert json.loads(json.dumps(before)) == before == open_checkpoint(path).identity
    (save_file if suffix == ".safetensors" else torch.save)({**weights, "one": torch.ones(1)}, path)
    assert open_checkpoint(path).identity != before


def test_a_folder_and_a_single_file_are_a_pair(llama_pair, tmp_path):
    lone = tmp_path / "tuned.safetensors"
    lone.write_bytes((Path(llama_pair[1]) / "model.safetensors").read_bytes())
    found, wanted = extract(llama_pair[0], lone, 8), extract(*llama_pair, 8)
    assert found.plan.layout == wanted.plan.layout
    assert found.layers.keys() == wanted.layers.keys()
    assert all(torch.equal(found.layers[name].factors.b, layer.factors.b) for name, layer in wanted.layers.items())


@pytest.mark.parametrize("write", FORMATS)
def test_the_same_weights_come_out_of_every_format(write, weights, tmp_path):
    write(weights, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, Checkpoint)
    assert same(checkpoint, weights)
    assert checkpoint.label == str(tmp_path)
    assert checkpoint.folder == tmp_path
    assert checkpoint.revision is checkpoint.module is checkpoint.config is None


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_what_transformers_saves_is_read_back_with_its_configuration(size, tmp_path):
    model = models.llama()
    models.save(model, tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "20KB")
    checkpoint = open_checkpoint(str(tmp_path))
    assert same(checkpoint, dict(model.state_dict()))
    assert checkpoint.config["model_type"] == "llama"


@pytest.mark.parametrize("first", ["20KB", "1GB"])
def test_of_a_folder_that_was_saved_into_twice_the_model_is_read_that_transformers_loads(first, tmp_path):
    # transformers leaves the first saving's index (or single file) in place.
    for size in (first, "1GB" if first == "20KB" else "20KB"):
        models.save(models.llama(), tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = models.load(tmp_path)
    assert same(open_checkpoint(tmp_path), dict(loaded.state_dict()))


def test_safetensors_come_before_pickles_and_what_is_no_weight_is_left_alone(weights, tmp_path):
    one_safetensors(weights, tmp_path)
    for other in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "consolidated.safetensors"):
        (tmp_path / other).write_bytes(b"not to be opened")
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert same(open_checkpoint(tmp_path), weights)


def test_a_folder_beside_a_pickled_model_may_hold_pickles_that_are_not_the_model(weights, tmp_path):
    one_bin(weights, tmp_path)
    for other in ("optimizer.pt", "training_args.bin", "scheduler.pt"):
        (tmp_path / other).write_bytes(b"not to be opened")
    assert same(open_checkpoint(tmp_path), weights)


@pytest.mark.parametrize("write", [one_safetensors, sharded_safetensors])
def test_headers_are_known_before_a_tensor_is_read(write, weights, tmp_path, monkeypatch):
    read = []
    mapped = folder.mmap.mmap
    monkeypatch.setattr(
        folder.mmap, "mmap", lambda file, size, **how: read.append((size, how["offset"])) or mapped(file, size, **how)
    )
    write(weights, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert {name: header.shape for name, header in checkpoint.headers.items()} == {
        name: tuple(tensor.shape) for name, tensor in weights.items()
    }
    assert read == []
    checkpoint.read("wide.weight")
    ((size, offset),) = read
    # The header before it, as far as it is on the same page, and the tensor: nothing of the others behind it.
    assert offset == 0
    assert size < (tmp_path / checkpoint.files["wide.weight"]).stat().st_size


def test_a_header_is_parsed_once_however_many_tensors_are_read(tmp_path, monkeypatch):
    parsed = []
    open_file = folder.safe_open
    monkeypatch.setattr(folder, "safe_open", lambda path, **how: parsed.append(path) or open_file(path, **how))
    tensors = {f"layers.{i}.proj.weight": torch.randn(4, 4) for i in range(50)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert parsed == [tmp_path / "model.safetensors"]


def test_tensors_at_odd_places_are_read(tmp_path):
    # A header that nobody filled up with spaces: no number begins where the processor would like it to.
    values = {"flags": torch.tensor([True, False, True]), "wide.weight": torch.randn(3, 5, dtype=torch.float64)}
    entries, at = {}, 0
    for name, code, tensor in (("flags", "BOOL", values["flags"]), ("wide.weight", "F64", values["wide.weight"])):
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    header = json.dumps(entries).encode()
    data = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in values.values())
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in values.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert torch.equal(checkpoint.read(name) + 1, tensor + 1)


def test_what_is_read_can_be_written_to_without_the_file(weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    open_checkpoint(tmp_path).read("wide.weight").zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_headers_of_a_file_with_no_data_behind_them_are_not_believed(weights, tmp_path):
    one_safetensors(weights, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors` is not a readable safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("write", [oddly_named_safetensors, oddly_named_index])
def test_one_name_in_two_files_is_an_error(write, weights, tmp_path):
    write(weights, tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        save_file({**load_file(path), "positions": weights["positions"]}, path)
    with pytest.raises(CheckpointError, match="hold `positions`"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model-00002-of-00002.bin"])
def test_one_shard_is_no_model_and_its_folder_is_named(name, tmp_path):
    values = {"layer.weight": torch.zeros(4, 4)}
    (save_file if name.endswith("safetensors") else torch.save)(values, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"one of 2 shards .*Give their folder: `{tmp_path}`"):
        open_checkpoint(tmp_path / name)


def test_the_only_shard_is_the_model(tmp_path):
    save_file({"layer.weight": torch.zeros(4, 4)}, tmp_path / "model-00001-of-00001.safetensors")
    assert open_checkpoint(tmp_path / "model-00001-of-00001.safetensors").headers.keys() == {"layer.weight"}
