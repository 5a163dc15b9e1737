"""Sharded training checkpoints (torch.distributed.checkpoint): what comes out of them, and what is refused."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from peft_posthoc import CheckpointError, extract, open_checkpoint, verify
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.sources import open_pair
from tests.make import models
from tests.make.limits import HANG
from tests.make.same import same
from tests.make.spoiled import NAMES, Payload, contents, forbid_svd, moved, refused, run, tensors

SHARDS = "pytorch_model_fsdp_0"


def save(state, where):
    """As one process saves it."""
    with warnings.catch_warnings():
        # That this is one process is what torch warns of.
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=where, no_dist=True)
    return where


def trained(where, weights):
    """A checkpoint folder as the Trainer leaves it under FSDP2, but for its size."""
    save({"model": weights}, where / SHARDS)
    save({"optimizer": {"state": {name: torch.zeros_like(w) for name, w in weights.items()}}}, where / "optimizer_0")
    for name in ("scheduler.pt", "rng_state_0.pth", "trainer_state.json"):
        (where / name).write_bytes(b"not to be opened")
    return where


def edited(shards, edit):
    """Change the metadata of shards that torch wrote."""
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    metadata = edit(metadata) or metadata
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.fixture
def weights():
    return {
        "layers.0.proj.weight": torch.randn(6, 4),
        "layers.1.proj.weight": torch.randn(6, 4, dtype=torch.bfloat16),
        "layers.1.proj.bias": torch.randn(6, dtype=torch.float16),
        "wide.weight": torch.randn(3, 50, dtype=torch.float64),
        "tall.weight": torch.randn(50, 3).T.contiguous().T,
        "conv.weight": torch.randn(2, 3, 5, 4).to(memory_format=torch.channels_last),
        "eight.bits": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "scale": torch.tensor(2.5),
        "positions": torch.arange(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder that commands run in: a good `base` and a good sharded `tuned`."""
    (tmp_path / "work" / "base").mkdir(parents=True)
    save_file(tensors(), tmp_path / "work" / "base" / "model.safetensors")
    trained(tmp_path / "work" / "tuned", moved(tensors()))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


# What two processes wrote.

SAVE = """
import os
import sys
from types import SimpleNamespace

import accelerate
from accelerate.utils.fsdp_utils import save_fsdp_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType

from tests.make import models

accelerator = accelerate.PartialState(cpu=True)
mesh = init_device_mesh("cpu", (2,))
plugin = SimpleNamespace(fsdp_version=2, state_dict_type=StateDictType.SHARDED_STATE_DICT, state_dict_config=None)
for place in sys.argv[1:]:
    model = models.load(f"{place}/tuned")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    save_fsdp_model(plugin, accelerator, model, f"{place}/checkpoint-3")
accelerator.wait_for_everyone()
accelerator.destroy_process_group()
# All is saved. Gloo's threads may outlive the interpreter, which once ended a process with "terminate called without an
# active exception" as it left.
os._exit(0)
"""


@pytest.fixture(scope="module")
def from_two_processes(tmp_path_factory):
    """Folders of `base`, `tuned` and `checkpoint-3`, which is `tuned` as accelerate saves it under FSDP2."""
    torch.manual_seed(0)
    places = {}
    for name, tied in (("own head", False), ("tied head", True)):
        places[name] = tmp_path_factory.mktemp("fsdp")
        # Odd sizes: the processes' pieces are not equally large.
        model = models.llama(vocab_size=97, intermediate_size=49, tie_word_embeddings=tied)
        models.save_pair(model, places[name])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    ran = subprocess.run(
        [*launcher, sys.executable, "-c", SAVE, *map(str, places.values())],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return places


@pytest.fixture(params=["own head", "tied head"])
def place(request, from_two_processes, tmp_path):
    """A copy of one of them, to be changed at will."""
    return Path(shutil.copytree(from_two_processes[request.param], tmp_path / "place"))


def test_tensors_that_two_processes_hold_halves_of_come_out_whole(place):
    shards = place / "checkpoint-3" / SHARDS
    assert sorted(os.listdir(place / "checkpoint-3")) == [SHARDS]
    assert sorted(os.listdir(shards)) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    assert {len(entry.chunks) for entry in metadata.state_dict_metadata.values()} == {2}
    assert all(name.startswith("model.") for name in metadata.state_dict_metadata)
    checkpoint = open_checkpoint(place / "checkpoint-3")
    assert isinstance(checkpoint, Checkpoint)
    assert same(checkpoint, dict(models.load(place / "tuned").state_dict()))
    assert checkpoint.label == str(place / "checkpoint-3")
    assert checkpoint.revision is checkpoint.module is checkpoint.config is checkpoint.folder is None


@pytest.mark.parametrize("given", ["checkpoint-3", f"checkpoint-3/{SHARDS}"])
@pytest.mark.parametrize("flags", [{}, {"embeddings": True, "head": True}])
def test_the_adapter_from_shards_is_that_from_safetensors(given, flags, place):
    expected = extract(place / "base", place / "tuned", 4, **flags)
    found = extract(place / "base", place / given, 4, **flags)
    assert len(expected.factors) >= 14
    assert found.factors.keys() == expected.factors.keys()
    for module, (a, b) in expected.factors.items():
        assert torch.equal(found.factors[module][0], a), module
        assert torch.equal(found.factors[module][1], b), module
    assert [row.weight for row in found.report.rows] == [row.weight for row in expected.report.rows]


def test_a_tied_weight_is_stored_twice_and_taken_once(from_two_processes):
    place = from_two_processes["tied head"]
    assert "lm_head.weight" in open_checkpoint(place / "checkpoint-3").headers
    base, tuned = open_pair(place / "base", place / "checkpoint-3")
    assert tuned.headers.keys() == base.headers.keys()
    assert "lm_head.weight" not in tuned.headers


def test_a_head_that_is_no_longer_the_embeddings_is_kept(tmp_path):
    base = {"embed.weight": torch.randn(9, 4), "layer.weight": torch.randn(4, 4), "norm.weight": torch.ones(4)}
    tuned = moved(base) | {"norm.weight": torch.ones(4), "norm2.weight": torch.ones(4)}
    for head, kept in ((tuned["embed.weight"] + 1, True), (tuned["embed.weight"].clone(), False)):
        shards = save({"model": tuned | {"head.weight": head}}, tmp_path / str(kept))
        _, found = open_pair(base, shards)
        assert ("head.weight" in found.headers) == kept
        # Vectors of ones are equal without being one.
        assert "norm2.weight" in found.headers


def test_shards_serve_as_a_base_too(place):
    found = extract(place / "checkpoint-3", place / "base", 4).factors
    expected = extract(place / "tuned", place / "base", 4).factors
    assert len(expected) == 14
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, y) for name in expected for x, y in zip(found[name], expected[name], strict=True))


@pytest.mark.parametrize("missing", [["__1_0.distcp"], ["__0_0.distcp", "__1_0.distcp"]])
def test_shards_that_another_node_kept_are_named(missing, place):
    for name in missing:
        (place / "checkpoint-3" / SHARDS / name).unlink()
    with pytest.raises(CheckpointError, match=rf"lacks shards .*: {', '.join(missing)}\. If each node"):
        open_checkpoint(place / "checkpoint-3")


# What one process wrote.


@pytest.mark.parametrize("wrap", [lambda weights: weights, lambda weights: {"model": weights}])
def test_tensors_of_every_type_come_out_as_they_were_saved(wrap, weights, tmp_path):
    shards = save(wrap(weights), tmp_path / "shards")
    assert same(open_checkpoint(shards), weights)


def test_what_is_no_tensor_is_passed_over(weights, tmp_path):
    shards = save({"model": {**weights, "extra_state": {"steps": 3, "names": ["a"]}}, "epoch": 2}, tmp_path / "shards")
    assert same(open_checkpoint(shards), weights)


def test_a_bare_state_dict_keeps_its_names_though_all_begin_with_model(tmp_path):
    bare = {f"model.{name}": weight for name, weight in tensors().items()}
    assert same(open_checkpoint(save(bare, tmp_path / "bare")), bare)
    assert same(open_checkpoint(save({"model": bare}, tmp_path / "wrapped")), bare)
    other = {**bare, "lm_head.weight": torch.randn(3, 3)}
    assert same(open_checkpoint(save(other, tmp_path / "other")), other)


def test_of_a_model_saved_beside_its_optimizer_the_model_is_read(tmp_path):
    state = {"model": tensors(), "optimizer": {"state": moved(tensors())}, "rng": torch.arange(5), "step": 7}
    assert same(open_checkpoint(save(state, tmp_path / "shards")), tensors())


def test_shards_are_found_beside_an_optimizer_and_not_taken_before_safetensors(tmp_path):
    where = trained(tmp_path / "checkpoint-3", tensors())
    assert same(open_checkpoint(where), tensors())
    save_file({"other": torch.ones(3)}, where / "model.safetensors")
    assert same(open_checkpoint(where), {"other": torch.ones(3)})
    (where / "model.safetensors").unlink()
    shutil.rmtree(where / SHARDS)
    with pytest.raises(CheckpointError, match=r"No weights in .*optimizer_0"):
        open_checkpoint(where)


def test_of_several_models_none_is_chosen(tmp_path):
    where = trained(tmp_path / "checkpoint-3", tensors())
    save({"model": moved(tensors())}, where / "pytorch_model_fsdp_1")
    with pytest.raises(CheckpointError, match=r"several sharded models \(pytorch_model_fsdp_0, pytorch_model_fsdp_1\)"):
        open_checkpoint(where)
    assert same(open_checkpoint(where / "pytorch_model_fsdp_1"), moved(tensors()))


def test_the_configuration_lies_in_the_given_folder_or_beside_the_shards(tmp_path, monkeypatch):
    where = trained(tmp_path / "checkpoint-3", tensors())
    assert open_checkpoint(where).config is None
    assert open_checkpoint(where / SHARDS).config is None
    (tmp_path / "config.json").write_text('{"model_type": "stranger"}')
    (where / "config.json").write_text('{"model_type": "mine"}')
    assert open_checkpoint(where).config == {"model_type": "mine"}
    assert open_checkpoint(where / SHARDS).config == {"model_type": "mine"}
    monkeypatch.chdir(where / SHARDS)
    assert open_checkpoint(".").config == {"model_type": "mine"}
    (where / "config.json").unlink()
    monkeypatch.chdir(where)
    assert open_checkpoint(".").config is None


def test_the_identity_is_plain_and_changes_with_a_shard(tmp_path):
    where = trained(tmp_path / "checkpoint-3", tensors())
    before = open_checkpoint(where).identity
    assert json.loads(json.dumps(before)) == before == open_checkpoint(where / SHARDS).identity
    assert {file for _, file, _, _ in before} == {".metadata", "__0_0.distcp"}
    os.utime(where / SHARDS / "__0_0.distcp", ns=(1, 1))
    assert open_checkpoint(where).identity != before


def test_a_shard_that_was_replaced_after_it_was_opened_is_not_read(tmp_path):
    shards = save({"w": torch.ones(3)}, tmp_path / "shards")
    checkpoint = open_checkpoint(shards)
    save({"w": torch.zeros(3)}, tmp_path / "new")
    (tmp_path / "new" / "__0_0.distcp").replace(shards / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"__0_0.distcp` changed while it was read"):
        checkpoint.read("w")


def test_verify_compares_the_weights_of_shards_and_says_that_no_outputs_are_compared(llama_pair, tmp_path):
    base, tuned = llama_pair
    where = trained(tmp_path / "checkpoint-3", dict(models.load(tuned).state_dict()))
    shutil.copy(Path(tuned) / "config.json", where)
    extract(base, where, 4).save(tmp_path / "lora")
    found = verify(tmp_path / "lora", base, where)
    assert found.cosine == verify(tmp_path / "lora", base, tuned, outputs=False).cosine > 0.3
    assert found.adapter is None
    assert "only checkpoints in folders" in found.outputs_note


@pytest.mark.parametrize("read", [True, False])
def test_nothing_of_torch_distributed_checkpoint_is_needed(read, tmp_path):
    shards = save(tensors(), tmp_path / "shards")
    by_torch = "import torch.distributed.checkpoint as d; d.FileSystemReader(sys.argv[1]).read_metadata()"
    by_us = "import peft_posthoc as p; c = p.open_checkpoint(sys.argv[1]); [c.read(name) for name in c.headers]"
    code = f"import sys; {by_us if read else by_torch}; print('torch.distributed.checkpoint.metadata' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code, shards], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(not read)


# Files that were not written by torch.


def test_the_good_sharded_checkpoint_is_good(work):
    status, stdout, stderr = run("extract", "base", "tuned", "out")
    assert status == 0, stderr
    assert stdout.endswith("Adapter written to out\n")


class Call:
    """Pickles to a call of what has this name."""

    def __init__(self, module, name, *arguments):
        self.bytes = b"".join(
            [b"\x80\x04", *map(pickle_text, (module, name)), b"\x93(", *map(pickle_text, arguments), b"tR."]
        )


def pickle_text(text):
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("os", "system", ["touch executed"]),
        ("posix", "system", ["touch executed"]),
        ("builtins", "open", ["executed", "w"]),
        ("builtins", "eval", ["open('executed', 'w')"]),
        ("builtins", "getattr", ["text", "upper"]),
        ("pathlib", "Path", ["executed"]),
        ("pathlib", "os.system", ["touch executed"]),
        ("torch", "load", ["executed"]),
        ("torch", "os.system", ["touch executed"]),
        ("torch", "__name__", []),
        ("torch.serialization", "load", ["executed"]),
        ("torch.serialization", "os.system", ["touch executed"]),
        ("torch.distributed.checkpoint.metadata", "os.system", ["touch executed"]),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__", []),
        ("torch.distributed.checkpoint.filesystem", "os.system", ["touch executed"]),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter", ["executed"]),
        ("no_such_module", "function", []),
    ],
)
def test_metadata_that_calls_for_anything_else_is_refused_and_not_executed(module, name, arguments, work):
    (work / "tuned" / SHARDS / ".metadata").write_bytes(Call(module, name, *arguments).bytes)
    before = contents(work)
    says = f"`tuned/{SHARDS}/.metadata` is refused"
    refused(run("extract", "base", "tuned", "out"), says, f"{module}.{name}", "Nothing of it was executed")
    assert contents(work) == before


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_call_hidden_in_good_metadata_is_refused_and_not_executed(side, work):
    if side == "base":
        shutil.rmtree(work / "base")
        trained(work / "base", tensors())
    target = work.parent / "executed"

    def hide(metadata):
        metadata.storage_meta.modules = [Payload(target)]

    edited(work / side / SHARDS, hide)
    before = contents(work)
    says = f"`{side}/{SHARDS}/.metadata` is refused"
    refused(run("extract", "base", "tuned", "out"), says, "io.open", "Nothing of it was executed")
    assert contents(work) == before
    assert not target.exists()
    # The payload is a real one, and torch's own reader falls for it.
    dcp.FileSystemReader(work / side / SHARDS).read_metadata().storage_meta.modules[0].close()
    assert target.exists()


def test_metadata_cannot_change_what_reads_it(work, monkeypatch):
    # `BUILD` with a pair sets attributes of what lies below it, be that a class.
    class_of = b"\x80\x04" + pickle_text("torch.distributed.checkpoint.metadata") + pickle_text("Metadata") + b"\x93"
    size = b"\x80\x04ctorch\nSize\n"
    for what in (class_of, size):
        attack = what + b"N}" + pickle_text("__setstate__") + b"Ns\x86b."
        (work / "tuned" / SHARDS / ".metadata").write_bytes(attack)
        refused(run("extract", "base", "tuned", "out"), "is refused")
    shutil.rmtree(work / "tuned")
    trained(work / "tuned", moved(tensors()))
    assert run("extract", "base", "tuned", "out")[0] == 0


def put_in_place_of_a_tensor(shards, content):
    """Let the metadata say that the first tensor is this; it is as long as that one at least."""
    buffer = io.BytesIO()
    torch.save([content, torch.zeros(24, 16)], buffer)

    def move(metadata):
        info = place_of(metadata)
        info.offset, info.length = (shards / "__0_0.distcp").stat().st_size, len(buffer.getvalue())

    edited(shards, move)
    with (shards / "__0_0.distcp").open("ab") as file:
        file.write(buffer.getvalue())
    return buffer


def test_a_malicious_shard_is_refused_and_not_executed(work):
    target = work.parent / "executed"
    buffer = put_in_place_of_a_tensor(work / "tuned" / SHARDS, Payload(target))
    before = contents(work)
    says = f"`tuned/{SHARDS}/__0_0.distcp` is refused"
    refused(run("extract", "base", "tuned", "out"), says, "Nothing of it was executed")
    assert contents(work) == before
    assert not target.exists()
    # The payload is a real one.
    buffer.seek(0)
    torch.load(buffer, weights_only=False)[0].close()
    assert target.exists()


@pytest.mark.parametrize(
    "place",
    [
        "{outside}/secret.distcp",
        "../outside/secret.distcp",
        "x/../../outside/secret.distcp",
        "./../outside/secret.distcp",
        "inside/secret.distcp",
        "..\\outside\\secret.distcp",
        "C:\\outside\\secret.distcp",
        "C:secret.distcp",
        "..",
        ".",
        "",
    ],
)
def test_metadata_cannot_name_a_file_elsewhere(place, work, monkeypatch):
    # The file it names is there and good wherever such a path can exist: only the refusal keeps it from being read.
    shards, outside = work / "tuned" / SHARDS, work / "tuned" / "outside"
    outside.mkdir()
    shutil.copy(shards / "__0_0.distcp", outside / "secret.distcp")
    (shards / "x").mkdir()
    shutil.copytree(outside, shards / "inside")
    place = place.format(outside=outside)

    def elsewhere(metadata):
        metadata.storage_data[MetadataIndex(f"model.{NAMES[1]}", [0, 0])].relative_path = place

    edited(shards, elsewhere)
    opened = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: opened.append(a) or load(*a, **k))
    before = contents(work)
    says = f"`tuned/{SHARDS}/.metadata` is refused"
    refused(run("extract", "base", f"tuned/{SHARDS}", "out"), says, f"in `{place}`", "not a file of its own folder")
    assert contents(work) == before
    assert opened == []

    # The same metadata is followed when the file lies beside it.
    place = "secret.distcp"
    edited(shards, elsewhere)
    shutil.copy(outside / "secret.distcp", shards)
    assert run("extract", "base", f"tuned/{SHARDS}", "out")[0] == 0
    assert opened


# Each function spoils a folder of shards, and gives what the message must say. None may start an SVD.


def no_metadata(at):
    (at / ".metadata").unlink()
    return f"`{at}/.metadata` is missing", "saving did not end"


def metadata_of_garbage(at):
    (at / ".metadata").write_bytes(bytes(range(256)) * 8)
    return f"`{at}/.metadata` is refused", "or is no pickle"


def metadata_of_text(at):
    (at / ".metadata").write_text("<html>404: not found</html>")
    return f"`{at}/.metadata` is refused", "or is no pickle"


def metadata_of_nothing(at):
    (at / ".metadata").write_bytes(b"")
    return f"`{at}/.metadata` is refused", "or is no pickle"


def metadata_cut_off(at):
    whole = (at / ".metadata").read_bytes()
    (at / ".metadata").write_bytes(whole[: len(whole) // 2])
    return f"`{at}/.metadata` is refused", "or is no pickle"


def a_folder_for_metadata(at):
    (at / ".metadata").unlink()
    (at / ".metadata").mkdir()
    return (f"`{at}/.metadata` cannot be read",)


def metadata_of_a_list(at):
    (at / ".metadata").write_bytes(pickle.dumps([1, 2, 3]))
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def metadata_of_a_dtype(at):
    (at / ".metadata").write_bytes(pickle.dumps(torch.float32))
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def metadata_of_a_class(at):
    (at / ".metadata").write_bytes(pickle.dumps(MetadataIndex))
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def metadata_without_places(at):
    edited(at, lambda metadata: setattr(metadata, "storage_data", {}))
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def metadata_of_no_tensors(at):
    edited(at, lambda metadata: metadata.state_dict_metadata.clear())
    return ("`tuned` holds no tensors",)


def entry(metadata):
    return metadata.state_dict_metadata[f"model.{NAMES[0]}"]


def place_of(metadata):
    return metadata.storage_data[MetadataIndex(f"model.{NAMES[0]}", [0, 0])]


def a_size_of_words(at):
    edited(at, lambda metadata: setattr(entry(metadata), "size", ("a", "b")))
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def a_negative_size(at):
    def negative(metadata):
        entry(metadata).size = (-24, -16)

    edited(at, negative)
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def an_offset_of_none(at):
    edited(at, lambda metadata: setattr(place_of(metadata), "offset", "0"))
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def no_dtype(at):
    edited(at, lambda metadata: setattr(entry(metadata).properties, "dtype", "float32"))
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def a_tensor_without_pieces(at):
    edited(at, lambda metadata: entry(metadata).chunks.clear())
    return f"`{at}/.metadata` is refused", f"pieces of `model.{NAMES[0]}` do not make up", "[24, 16]"


def a_tensor_larger_than_its_pieces(at):
    edited(at, lambda metadata: setattr(entry(metadata), "size", torch.Size([10**9, 16])))
    return f"`{at}/.metadata` is refused", f"pieces of `model.{NAMES[0]}` do not make up"


def a_piece_larger_than_its_file(at):
    def huge(metadata):
        entry(metadata).size = entry(metadata).chunks[0].sizes = torch.Size([10**9, 16])

    edited(at, huge)
    return f"`{at}/.metadata` is refused", f"piece of `model.{NAMES[0]}` does not fit"


def a_piece_out_of_its_tensor(at):
    def shift(metadata):
        (chunk,) = entry(metadata).chunks
        info = place_of(metadata)
        chunk.offsets = torch.Size([1, 0])
        metadata.storage_data[MetadataIndex(f"model.{NAMES[0]}", [1, 0])] = info

    edited(at, shift)
    return f"`{at}/.metadata` is refused", f"piece of `model.{NAMES[0]}` does not fit"


def a_compressed_tensor(at):
    edited(at, lambda metadata: setattr(place_of(metadata), "transform_descriptors", ["stream.zstd/1"]))
    return f"`{at}/.metadata` is refused", "compressed", f"`model.{NAMES[0]}`"


def one_name_twice(at):
    def twice(metadata):
        metadata.planner_data[f"model.{NAMES[1]}"] = ("model", NAMES[0])

    edited(at, twice)
    return f"`{at}/.metadata` is refused", f"`{NAMES[0]}` twice"


def no_shard(at):
    (at / "__0_0.distcp").unlink()
    return f"`{at}` lacks shards", "__0_0.distcp"


def a_folder_for_a_shard(at):
    (at / "__0_0.distcp").unlink()
    (at / "__0_0.distcp").mkdir()
    return f"`{at}` lacks shards", "__0_0.distcp"


def a_shard_cut_off(at):
    whole = (at / "__0_0.distcp").read_bytes()
    (at / "__0_0.distcp").write_bytes(whole[:-1])
    return f"`{at}/__0_0.distcp` is cut off", f"it has {len(whole) - 1} bytes", f"up to byte {len(whole)}"


def an_empty_shard(at):
    (at / "__0_0.distcp").write_bytes(b"")
    return (f"`{at}/__0_0.distcp` is cut off",)


SPOILED = [
    no_metadata,
    metadata_of_garbage,
    metadata_of_text,
    metadata_of_nothing,
    metadata_cut_off,
    a_folder_for_metadata,
    metadata_of_a_list,
    metadata_of_a_dtype,
    metadata_of_a_class,
    metadata_without_places,
    metadata_of_no_tensors,
    a_size_of_words,
    a_negative_size,
    an_offset_of_none,
    no_dtype,
    a_tensor_without_pieces,
    a_tensor_larger_than_its_pieces,
    a_piece_larger_than_its_file,
    a_piece_out_of_its_tensor,
    a_compressed_tensor,
    one_name_twice,
    no_shard,
    a_folder_for_a_shard,
    a_shard_cut_off,
    an_empty_shard,
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_shards_that_cannot_be_read_are_named_before_any_svd(spoil, work, monkeypatch):
    forbid_svd(monkeypatch)
    says = spoil(Path("tuned") / SHARDS)
    before = contents(work)
    refused(run("extract", "base", "tuned", "out"), *says)
    assert contents(work) == before


def shard_of_garbage(at):
    size = (at / "__0_0.distcp").stat().st_size
    (at / "__0_0.distcp").write_bytes((bytes(range(256)) * (1 + size // 256))[:size])
    return f"`{at}/__0_0.distcp`", "Nothing of it was executed"


def a_flipped_name(at):
    content = (at / "__0_0.distcp").read_bytes()
    (at / "__0_0.distcp").write_bytes(content.replace(b"data.pkl", b"atad.pkl"))
    return (f"`{at}/__0_0.distcp` is not a readable shard",)


def another_tensor(at):
    def swap(metadata):
        places = metadata.storage_data
        one, two = (MetadataIndex(f"model.{name}", [0, 0]) for name in NAMES[:2])
        places[one], places[two] = places[two], places[one]

    edited(at, swap)
    return f"`{at}/__0_0.distcp` is refused", "does not hold the tensor that its metadata describes"


def another_dtype(at):
    def narrow(metadata):
        entry(metadata).properties.dtype = torch.bfloat16

    edited(at, narrow)
    return f"`{at}/__0_0.distcp` is refused", "does not hold the tensor that its metadata describes"


def no_tensor_at_all(at):
    put_in_place_of_a_tensor(at, "text")
    return f"`{at}/__0_0.distcp` is refused", "does not hold the tensor that its metadata describes"


@pytest.mark.parametrize("spoil", [shard_of_garbage, a_flipped_name, another_tensor, another_dtype, no_tensor_at_all])
def test_a_shard_with_other_content_is_named(spoil, work):
    says = spoil(Path("tuned") / SHARDS)
    before = contents(work)
    refused(run("extract", "base", "tuned", "out"), *says)
    assert contents(work) == before


def pieced(where, size, pieces):
    """Shards of one tensor `w` of that size; `pieces` are what they hold, by offsets."""
    shards = save({f"piece{i}": piece for i, piece in enumerate(pieces.values())}, where)

    def join(metadata):
        entries, places = metadata.state_dict_metadata, metadata.storage_data
        properties = entries["piece0"].properties
        chunks = [ChunkStorageMetadata(torch.Size(at), piece.shape) for at, piece in pieces.items()]
        by_piece = {
            MetadataIndex("w", at): places[MetadataIndex(f"piece{i}", [0] * piece.ndim)]
            for i, (at, piece) in enumerate(pieces.items())
        }
        assert all(isinstance(info, _StorageInfo) for info in by_piece.values())
        metadata.state_dict_metadata = {"w": TensorStorageMetadata(properties, torch.Size(size), chunks)}
        metadata.storage_data, metadata.planner_data = by_piece, {"w": ("w",)}

    edited(shards, join)
    return shards


def test_pieces_cut_along_any_side_are_put_together(tmp_path):
    whole = torch.randn(7, 6, 5, dtype=torch.bfloat16)
    cuts = [(slice(i, i + 3), slice(j, j + 4), slice(k, k + 2)) for i in (0, 3, 6) for j in (0, 4) for k in (0, 2, 4)]
    pieces = {tuple(side.start for side in cut): whole[cut].contiguous() for cut in cuts}
    # What a process writes that has nothing of it.
    pieces[7, 0, 0] = whole[7:]
    assert same(open_checkpoint(pieced(tmp_path / "shards", whole.shape, pieces)), {"w": whole})


def test_where_pieces_overlap_what_no_piece_covers_is_not_what_was_in_memory(tmp_path):
    rows = torch.ones(2, 64)
    checkpoint = open_checkpoint(pieced(tmp_path / "shards", (4, 64), {(0, 0): rows, (1, 0): rows}))
    for _ in range(20):
        left_in_memory = torch.full((4, 64), 7.0)
        del left_in_memory
        assert checkpoint.read("w")[3].tolist() == [0.0] * 64
