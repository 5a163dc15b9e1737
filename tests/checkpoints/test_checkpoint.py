import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from peft_posthoc import CheckpointError, extract, open_checkpoint, verify
from peft_posthoc.checkpoints import files, folder
from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.memory import InMemory
from tests.make import models
from tests.make.same import same


@pytest.fixture
def weights():
    """Named tensors of several types and shapes, as a checkpoint holds them."""
    return {
        "layers.0.proj.weight": torch.randn(6, 4),
        "layers.1.proj.weight": torch.randn(6, 4, dtype=torch.bfloat16),
        "layers.1.proj.bias": torch.randn(6, dtype=torch.float16),
        "wide.weight": torch.randn(3, 50, dtype=torch.float64),
        "conv.weight": torch.randn(2, 3, 5),
        "scale": torch.tensor(2.5),
        "positions": torch.arange(7),
        "empty": torch.zeros(0, 4),
    }


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


@pytest.mark.parametrize("suffix", files.SUFFIXES)
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


def test_a_module_gives_its_parameters_and_its_saved_buffers(weights):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 6)
            self.register_buffer("mean", torch.randn(6))
            self.register_buffer("scratch", torch.randn(6), persistent=False)

    block = Block()
    checkpoint = open_checkpoint(block)
    assert same(checkpoint, dict(block.state_dict()))
    assert "scratch" not in checkpoint.headers
    assert checkpoint.module is block
    assert checkpoint.label == "Block"
    assert checkpoint.config is checkpoint.folder is checkpoint.revision is None


def test_a_module_gives_a_tied_weight_once_as_its_saved_folder_does(tmp_path):
    model = models.llama(tie_word_embeddings=True)
    models.save(model, tmp_path)
    live, saved = open_checkpoint(model), open_checkpoint(tmp_path)
    assert "lm_head.weight" in model.state_dict()
    assert "lm_head.weight" not in live.headers
    assert live.headers == saved.headers
    assert live.config["tie_word_embeddings"] is True
    assert same(live, {name: saved.read(name) for name in saved.headers})


def test_tensors_of_a_live_model_are_not_copied():
    layer = nn.Linear(4, 6)
    for source in (layer, layer.state_dict()):
        assert open_checkpoint(source).read("weight").data_ptr() == layer.weight.data_ptr()


def test_a_state_dict_is_a_source(weights):
    checkpoint = open_checkpoint(weights)
    assert same(checkpoint, weights)
    assert checkpoint.label == "state dict"
    assert checkpoint.module is checkpoint.folder is checkpoint.config is None


def test_every_kind_of_source_gives_the_same_factors(tmp_path):
    model = models.llama()
    tuned = models.tuned_from(model)
    models.save(model, tmp_path / "base")
    models.save(tuned, tmp_path / "tuned", max_shard_size="20KB")
    pairs = {
        "folders": (tmp_path / "base", str(tmp_path / "tuned")),
        "modules": (model, tuned),
        "folder and state dict": (tmp_path / "base", tuned.state_dict()),
        "module and checkpoint": (model, open_checkpoint(tmp_path / "tuned")),
    }
    expected = extract(*pairs.pop("folders"), 4).factors
    assert len(expected) == 14
    for kind, pair in pairs.items():
        factors = extract(*pair, 4).factors
        assert factors.keys() == expected.keys(), kind
        for module, (a, b) in expected.items():
            assert torch.equal(factors[module][0], a), (kind, module)
            assert torch.equal(factors[module][1], b), (kind, module)


def test_a_peft_model_is_refused_until_it_is_merged():
    model = models.llama()
    plain = copy.deepcopy(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        open_checkpoint(wrapped)
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        open_checkpoint(wrapped.get_base_model())
    assert same(open_checkpoint(wrapped.merge_and_unload()), dict(plain.state_dict()))


def test_a_checkpoint_object_passes_through(weights):
    class Renamed:
        label, revision, folder, identity, config, module = "mine", None, None, None, None, None
        sequential = False

        @property
        def headers(self):
            return {f"model.{name}": Header(tuple(t.shape), t.dtype) for name, t in weights.items()}

        def read(self, name):
            return weights[name.removeprefix("model.")]

    mine = Renamed()
    assert open_checkpoint(mine) is mine
    live = InMemory(weights, label="live")
    assert open_checkpoint(live) is live


@pytest.mark.parametrize("kind", ["folder", "module", "state dict", "checkpoint"])
def test_only_a_hub_id_has_a_revision(kind, weights, tmp_path):
    one_safetensors(weights, tmp_path)
    sources = {
        "folder": tmp_path,
        "module": nn.Linear(2, 2),
        "state dict": weights,
        "checkpoint": open_checkpoint(weights),
    }
    with pytest.raises(ValueError, match=r"'v1'.*hub id; the base"):
        open_checkpoint(sources[kind], revision="v1", role="base")


def test_a_state_dict_with_something_else_in_it_is_refused(weights):
    with pytest.raises(CheckpointError, match="tuned state dict holds values that are no tensors: epoch, optimizer"):
        open_checkpoint({**weights, "epoch": 3, "optimizer": {}}, role="tuned")


@pytest.mark.parametrize("nothing", [{}, nn.Identity()])
def test_a_source_without_tensors_is_refused(nothing):
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_checkpoint(nothing)


@pytest.mark.parametrize("stranger", [None, 3, [torch.zeros(2, 2)], b"folder"])
def test_anything_else_is_a_type_error_that_names_what_came(stranger):
    with pytest.raises(TypeError, match=f"The base must be .* Got {type(stranger).__name__}"):
        open_checkpoint(stranger, role="base")


def test_a_model_without_values_is_refused_when_it_is_read():
    with torch.device("meta"):
        model = models.llama()
    checkpoint = open_checkpoint(model)
    assert checkpoint.headers["lm_head.weight"].shape == (96, 32)
    with pytest.raises(CheckpointError, match=r"`lm_head\.weight` of the LlamaForCausalLM is on the meta device"):
        checkpoint.read("lm_head.weight")
    with pytest.raises(CheckpointError, match="meta device"):
        extract(model, models.llama())


def test_a_file_that_was_replaced_after_it_was_opened_is_not_read(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    save_file({"w": torch.zeros(3)}, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors` changed while it was read"):
        checkpoint.read("w")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_file_is_mapped_no_longer_than_its_tensors_are_held(tmp_path):
    save_file({"w": torch.ones(3), "v": torch.ones(3)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    held = checkpoint.read("w")
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del held
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


# Models that were compiled: `torch.compile(module)` is a module of its own, and its name goes into theirs.


def compiled_whole(model):
    # Nothing is run, so nothing is compiled; to import torch's own backend takes seconds.
    return torch.compile(model, backend="eager")


def compiled_layers(model):
    layers = model.transformer.h
    for i, layer in enumerate(layers):
        layers[i] = compiled_whole(layer)
    return model


def compiled_twice_over(model):
    return compiled_whole(compiled_layers(model))


def named_as_saved(model):
    """What `torch.save(model.state_dict())` and its kin would name them; a tied weight under one name."""
    tensors = InMemory(model.state_dict(), label="")
    return {name: tensors.read(name).clone() for name in tensors.headers}


def as_module(model, where):
    return model


def as_state_dict(model, where):
    return model.state_dict()


def as_safetensors(model, where):
    where.mkdir()
    save_file(named_as_saved(model), where / "model.safetensors")
    model.config.save_pretrained(where)
    return where


def as_shards(model, where):
    with warnings.catch_warnings():
        # That this is one process is what torch warns of.
        warnings.simplefilter("ignore")
        dcp.save({"model": named_as_saved(model)}, checkpoint_id=where / "pytorch_model_fsdp_0", no_dist=True)
    return where


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_layers, compiled_twice_over])
@pytest.mark.parametrize("give", [as_module, as_state_dict, as_safetensors, as_shards])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_compiled_model_gives_what_it_gives_without(side, give, compiled, tmp_path):
    base = models.gpt2()
    tuned = models.tuned_from(base)
    # Of GPT-2, only its class or its configuration tells how weights are stored.
    base.config.architectures = ["GPT2LMHeadModel"]
    expected = extract(models.save(base, tmp_path / "base"), models.save(tuned, tmp_path / "tuned"), 4).factors
    assert len(expected) == 8
    plain = {"base": tmp_path / "base", "tuned": tmp_path / "tuned"}
    model = compiled(base if side == "base" else tuned)
    assert any("_orig_mod." in name for name in model.state_dict())
    factors = extract(**{**plain, side: give(model, tmp_path / "compiled")}, rank=4).factors
    assert factors.keys() == expected.keys()
    for module, (a, b) in expected.items():
        assert torch.equal(factors[module][0], a), module
        assert torch.equal(factors[module][1], b), module


def test_a_live_compiled_model_is_asked_for_its_kinds_of_layers():
    # Without a configuration, names alone would not do.
    base = models.gpt2()
    tuned = models.tuned_from(base)
    expected = extract(base, tuned, 4).factors
    live = open_checkpoint(compiled_twice_over(copy.deepcopy(base)))
    assert same(live, named_as_saved(base))
    assert not any("_orig_mod" in name for name, _ in live.module.named_modules())
    assert live.module.get_output_embeddings() is live.module.lm_head
    assert extract(live, tuned.state_dict(), 4).factors.keys() == expected.keys()


def test_to_look_into_a_compiled_model_does_not_change_it():
    model = compiled_twice_over(models.gpt2())
    before = dict(model.named_modules())
    open_checkpoint(model)
    assert dict(model.named_modules()) == before
    plain = models.gpt2()
    assert open_checkpoint(plain).module is plain


def test_only_a_whole_part_of_a_name_is_that_of_a_compiled_module(weights):
    odd = {"my_orig_mod.weight": torch.ones(2), "_orig_mods.weight": torch.ones(3), **weights}
    assert same(open_checkpoint(odd), odd)
    renamed = open_checkpoint({"a._orig_mod.b._orig_mod.weight": torch.ones(2), "_orig_mod.c": torch.ones(3)})
    assert same(renamed, {"a.b.weight": torch.ones(2), "c": torch.ones(3)})
    assert renamed.label == "state dict"
    assert open_checkpoint(renamed) is renamed


def test_one_weight_with_and_without_the_name_of_a_compiled_module_is_an_error(tmp_path):
    save_file({"a._orig_mod.weight": torch.ones(2), "a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds both `a\..*weight` and `a\..*weight`.*torch\.compile"):
        open_checkpoint(tmp_path)


def test_a_folder_of_a_compiled_model_is_not_loaded_as_a_model(tmp_path):
    base, tuned = models.save_pair(models.llama(), tmp_path)
    kept = {f"_orig_mod.{name}": tensor for name, tensor in load_file(tmp_path / "tuned/model.safetensors").items()}
    extract(base, tuned, 4).save(tmp_path / "lora")
    whole = verify(tmp_path / "lora", base, tuned)
    save_file(kept, tmp_path / "tuned/model.safetensors")
    found = verify(tmp_path / "lora", base, tuned)
    assert whole.adapter is not None
    # transformers would take none of its weights, and give random ones.
    assert found.adapter is None
    assert found.cosine == whole.cosine
