"""Checkpoints that cannot be read, through the real command: one line that says what, where and what to do."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import extract
from peft_posthoc.checkpoints import folder
from tests.make.spoiled import (
    NAMES,
    Payload,
    contents,
    moved,
    refused,
    run,
    tensors,
    without_progress,
    write,
)
from tests.make.unreadable import UNREADABLE, as_bin, truncated


def test_the_good_pair_is_good(work):
    status, stdout, stderr = run("extract", "base", "tuned", "out")
    assert status == 0
    assert "\nAdapter written to out\n" in stdout
    assert without_progress(stderr) == []
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "phlora_report.json"}
    assert {path.name for path in (work / "out").iterdir()} == names
    assert {path.name for path in work.iterdir()} == {"base", "tuned", "out"}


@pytest.mark.parametrize("spoil", UNREADABLE)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_checkpoint_that_cannot_be_read_is_named(side, spoil, work):
    says = spoil(work / side)
    before = contents(work)
    refused(run("extract", "base", "tuned", "out"), *([says] if isinstance(says, str) else says))
    assert contents(work) == before


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_the_other_commands_say_the_same(command, work):
    truncated(work / "tuned")
    models_given = ["base", "tuned"] if command == "inspect" else ["lora", "--base", "base", "--tuned", "tuned"]
    extract(tensors(), moved(tensors()), 2).save(work / "lora")
    before = contents(work)
    refused(run(command, *models_given), "`tuned/model.safetensors` is not a readable safetensors file")
    assert contents(work) == before


@pytest.mark.parametrize(
    "place",
    [
        "{outside}/secret.safetensors",
        "../outside/secret.safetensors",
        "x/../../outside/secret.safetensors",
        "./../outside/secret.safetensors",
        "inside/secret.safetensors",
        "..\\outside\\secret.safetensors",
        "C:\\outside\\secret.safetensors",
        "C:secret.safetensors",
        "\\\\host\\outside\\secret.safetensors",
        "..",
        "",
    ],
)
@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_cannot_name_a_file_elsewhere(stem, place, work, tmp_path, monkeypatch):
    # The file it names is there and good wherever such a path can exist: only the refusal keeps it from being read.
    outside = write(tmp_path / "outside", tensors())
    (outside / "model.safetensors").rename(outside / "secret.safetensors")
    (work / "base" / "x").mkdir()
    shutil.copytree(outside, work / "base" / "inside")
    (work / "base" / "model.safetensors").unlink()
    place = place.format(outside=outside)
    (work / "base" / f"{stem}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(NAMES, place)}))
    opened = []
    for module, function in ((folder, "safe_open"), (torch, "load")):
        original = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda path, *a, original=original, **k: opened.append(path) or original(path, *a, **k)
        )
    before = contents(tmp_path)
    refused(run("extract", "base", "tuned", "out"), f"`base/{stem}.index.json`", f"in `{place}`", "Refused")
    assert contents(tmp_path) == before
    assert opened == []

    # The same index is followed when the file lies beside it.
    shutil.copy(outside / "secret.safetensors", work / "base")
    index = {"weight_map": dict.fromkeys(NAMES, "secret.safetensors")}
    (work / "base" / f"{stem}.index.json").write_text(json.dumps(index))
    assert run("extract", "base", "tuned", "out")[0] == 0
    assert set(opened) == {Path("base/secret.safetensors"), Path("tuned/model.safetensors")}


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "shard"])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_malicious_pickle_is_refused_and_not_executed(side, form, work, tmp_path):
    target = tmp_path / "executed"
    at = work / side
    content = {**tensors(), "extra": Payload(target)}
    name = "pytorch_model.bin"
    if form == "bare pickle":
        (at / "model.safetensors").unlink()
        (at / name).write_bytes(pickle.dumps(content))
    else:
        as_bin(at, content, _use_new_zipfile_serialization=form != "legacy")
    if form == "shard":
        name = "pytorch_model-00001-of-00001.bin"
        (at / "pytorch_model.bin").rename(at / name)
        (at / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(NAMES, name)}))
    before = contents(work)
    refused(run("extract", "base", "tuned", "out"), f"`{side}/{name}` is refused", "Nothing of it was executed")
    assert contents(work) == before
    assert not target.exists()
    # The payload is a real one.
    pickle.loads(pickle.dumps(Payload(target))).close()
    assert target.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_value_that_is_no_number_is_named_with_its_weight_and_side(side, name, value, work):
    weights = load_file(work / side / "model.safetensors")
    weights[name].view(-1)[3] = value
    save_file(weights, work / side / "model.safetensors")
    before = contents(work)
    refused(run("extract", "base", "tuned", "out"), f"The {side} checkpoint", "NaN or infinity", f"`{name}`", "1 of")
    assert contents(work) == before


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_value_that_is_no_number_is_named_in_a_weight_that_one_side_has(side, work):
    extra = {"extra.weight": torch.full((3, 3), float("nan"))}
    save_file(load_file(work / side / "model.safetensors") | extra, work / side / "model.safetensors")
    before = contents(work)
    refused(run("extract", "base", "tuned", "out"), f"The {side} checkpoint", "NaN or infinity", "`extra.weight`")
    assert contents(work) == before


@pytest.mark.parametrize(
    "config",
    [{"architectures": 5}, {"architectures": {"a": 1}}, {"model_type": ["llama"]}],
    ids=["a number of architectures", "a mapping of architectures", "a list of model types"],
)
def test_a_configuration_with_fields_of_another_type_is_no_crash(config, work):
    for side in ("base", "tuned"):
        (work / side / "config.json").write_text(json.dumps(config))
    status, _, stderr = run("extract", "base", "tuned", "out")
    assert status == 0 or "config.json" in stderr
    assert "Unexpected" not in stderr


def test_a_misspelt_file_of_a_folder_that_is_here_is_not_looked_for_on_the_hub(work):
    said = refused(run("extract", "base", "tuned/model.gguf", "out"), "`tuned/model.gguf` does not exist")
    assert "(`tuned` holds model.safetensors)" in said
    assert "hub:" not in said
