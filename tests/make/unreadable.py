"""Ways to spoil a checkpoint's folder so that it cannot be read; each returns what is then told."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from tests.make.spoiled import (
    NAMES,
    tensors,
)


def gone(at):
    shutil.rmtree(at)
    return f"`{at.name}` does not exist", "hub id"


def a_file(at):
    shutil.rmtree(at)
    at.write_text("weights")
    return f"`{at.name}` is a file of another kind than .safetensors"


def empty(at):
    (at / "model.safetensors").unlink()
    return f"No weights in `{at.name}`", "it holds nothing", "model.safetensors"


def other_files(at):
    (at / "model.safetensors").rename(at / "model.onnx")
    return f"No weights in `{at.name}`", "model.onnx"


def no_gguf(at):
    (at / "model.safetensors").rename(at / "model.gguf")
    return f"{at.name}/model.gguf` is not a readable GGUF file"


def no_tensors(at):
    save_file({}, at / "model.safetensors")
    return f"`{at.name}` holds no tensors"


def truncated(at):
    whole = (at / "model.safetensors").read_bytes()
    (at / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return f"`{at.name}/model.safetensors` is not a readable safetensors file"


def cut_in_its_header(at):
    (at / "model.safetensors").write_bytes((at / "model.safetensors").read_bytes()[:20])
    return f"`{at.name}/model.safetensors` is not a readable safetensors file"


def nothing_in_the_file(at):
    (at / "model.safetensors").write_bytes(b"")
    return f"`{at.name}/model.safetensors` is not a readable safetensors file"


def garbage(at):
    (at / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    return f"`{at.name}/model.safetensors` is not a readable safetensors file"


def a_folder_for_a_file(at):
    (at / "model.safetensors").unlink()
    (at / "model.safetensors").mkdir()
    return f"`{at.name}/model.safetensors` is not a readable safetensors file"


def a_pointer_of_git_lfs(at):
    (at / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 42\n")
    return f"`{at.name}/model.safetensors` is not a readable safetensors file"


def index(at, weight_map):
    weights = load_file(at / "model.safetensors")
    (at / "model.safetensors").unlink()
    save_file(weights, at / "one.safetensors")
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (at / "model.safetensors.index.json").write_text(text)


def a_missing_shard(at):
    index(at, {NAMES[0]: "one.safetensors", NAMES[1]: "two.safetensors", NAMES[2]: "three.safetensors"})
    return f"index of `{at.name}`", "not there: three.safetensors, two.safetensors"


def a_shard_without_its_tensor(at):
    index(at, {**dict.fromkeys(NAMES, "one.safetensors"), "layers.2.proj.weight": "one.safetensors"})
    return f"index of `{at.name}`", "layers.2.proj.weight"


def an_index_that_is_no_json(at):
    index(at, "{")
    return f"`{at.name}/model.safetensors.index.json` is not a valid index"


def an_index_that_is_a_list(at):
    index(at, "[]")
    return f"`{at.name}/model.safetensors.index.json` is not a valid index"


def an_index_without_a_map(at):
    index(at, '{"metadata": {}}')
    return f"`{at.name}/model.safetensors.index.json` is not a valid index"


def an_index_of_nothing(at):
    index(at, {})
    return f"`{at.name}` holds no tensors"


def an_index_as_deep_as_the_sea(at):
    index(at, "[" * 100_000)
    return f"`{at.name}/model.safetensors.index.json` is not a valid index"


def a_configuration_that_is_no_json(at):
    (at / "config.json").write_text("{'model_type': 'llama'}")
    return f"`{at.name}/config.json` is not valid JSON"


def a_configuration_that_is_a_list(at):
    (at / "config.json").write_text("[]")
    return f"`{at.name}/config.json`", "expected a JSON object"


def as_bin(at, content, **how):
    (at / "model.safetensors").unlink()
    torch.save(content, at / "pytorch_model.bin", **how)


def a_training_state_for_a_model(at):
    as_bin(at, {"model": tensors(), "epoch": 3})
    return f"`{at.name}/pytorch_model.bin` is refused", "`model` (dict)", "`epoch` (int)", "state dict"


def tensors_in_lists(at):
    as_bin(at, {"layers": [{NAMES[0]: torch.zeros(2, 2)}]})
    return f"`{at.name}/pytorch_model.bin` is refused", "`layers` (list)"


def a_list_for_a_model(at):
    as_bin(at, [torch.zeros(2, 2)])
    return f"`{at.name}/pytorch_model.bin` is refused", "holds a list"


def a_tensor_without_values(at):
    as_bin(at, {NAMES[0]: torch.empty(24, 16, device="meta")})
    return f"`{at.name}/pytorch_model.bin` is refused", f"`{NAMES[0]}` (not dense)"


def a_sparse_tensor(at):
    as_bin(at, {NAMES[0]: torch.eye(16).to_sparse()})
    return f"`{at.name}/pytorch_model.bin` is refused", f"`{NAMES[0]}` (not dense)"


def a_pickle_of_a_class(at):
    as_bin(at, {"model": torch.nn.Linear(2, 2)})
    return f"`{at.name}/pytorch_model.bin` is refused", "Nothing of it was executed", "safetensors"


def a_truncated_bin(at):
    as_bin(at, tensors())
    whole = (at / "pytorch_model.bin").read_bytes()
    (at / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    return f"`{at.name}/pytorch_model.bin` is not a readable PyTorch file"


def a_truncated_legacy_bin(at):
    as_bin(at, tensors(), _use_new_zipfile_serialization=False)
    whole = (at / "pytorch_model.bin").read_bytes()
    (at / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    return f"`{at.name}/pytorch_model.bin` is not a readable PyTorch file"


def an_empty_bin(at):
    as_bin(at, tensors())
    (at / "pytorch_model.bin").write_bytes(b"")
    return f"`{at.name}/pytorch_model.bin` is not a readable PyTorch file"


def a_bin_of_text(at):
    as_bin(at, tensors())
    (at / "pytorch_model.bin").write_text("<html>404: not found</html>")
    return (f"`{at.name}/pytorch_model.bin` is refused",)


def an_adapter(at):
    shutil.rmtree(at)
    save_file(
        {"base_model.model.layers.0.proj.lora_A.weight": torch.zeros(2, 2)}, made(at) / "adapter_model.safetensors"
    )
    (at / "adapter_config.json").write_text("{}")
    return f"`{at.name}` is a LoRA adapter that does not name its base", f"BASE+{at.name}"


def made(at):
    at.mkdir()
    return at


UNREADABLE = [
    gone,
    a_file,
    empty,
    other_files,
    no_gguf,
    no_tensors,
    truncated,
    cut_in_its_header,
    nothing_in_the_file,
    garbage,
    a_folder_for_a_file,
    a_pointer_of_git_lfs,
    a_missing_shard,
    a_shard_without_its_tensor,
    an_index_that_is_no_json,
    an_index_that_is_a_list,
    an_index_without_a_map,
    an_index_of_nothing,
    an_index_as_deep_as_the_sea,
    a_configuration_that_is_no_json,
    a_configuration_that_is_a_list,
    a_training_state_for_a_model,
    tensors_in_lists,
    a_list_for_a_model,
    a_tensor_without_values,
    a_sparse_tensor,
    a_pickle_of_a_class,
    a_truncated_bin,
    a_truncated_legacy_bin,
    an_empty_bin,
    a_bin_of_text,
    an_adapter,
]
