"""DeepSpeed's ZeRO checkpoints: what two processes wrote comes out whole, and no pickle of it is executed."""

import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import CheckpointError, MissingExtraError, extract, open_checkpoint
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.zero import find_partitions
from tests.make import models
from tests.make.limits import HANG
from tests.make.same import same
from tests.make.spoiled import moved, refused, run, tensors

MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def partitions(where, step=4):
    """Files by the names that DeepSpeed gives them."""
    folder = where / f"global_step{step}"
    folder.mkdir(parents=True)
    for name in (MODEL, OPTIMIZER):
        torch.save({}, folder / name)
    return folder


# Without DeepSpeed.


def test_without_deepspeed_the_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.fp16.loss_scaler", None)
    monkeypatch.chdir(tmp_path)
    save_file(tensors(), tmp_path / "base.safetensors")
    partitions(tmp_path / "tuned")
    with pytest.raises(MissingExtraError, match="`tuned` is a ZeRO checkpoint"):
        open_checkpoint("tuned")
    refused(
        run("extract", "base.safetensors", "tuned", "out"),
        "pip install 'peft-posthoc[deepspeed]'",
        "python zero_to_fp32.py . OUT --safe_serialization",
    )
    assert not (tmp_path / "out").exists()


def test_whole_weights_beside_partitions_are_preferred(tmp_path):
    partitions(tmp_path)
    (tmp_path / "latest").write_text("global_step4")
    save_file(moved(tensors()), tmp_path / "model.safetensors")
    assert same(open_checkpoint(tmp_path), moved(tensors()))


def test_latest_says_which_of_several(tmp_path):
    first, second = partitions(tmp_path, 4), partitions(tmp_path, 8)
    assert find_partitions(first) == first
    with pytest.raises(CheckpointError, match=r"several ZeRO checkpoints \(global_step4, global_step8\)\. Give one"):
        find_partitions(tmp_path)
    (tmp_path / "latest").write_text("global_step8\n")
    assert find_partitions(tmp_path) == second
    (tmp_path / "latest").write_text("global_step9")
    with pytest.raises(
        CheckpointError, match=r"`global_step9`, which holds no ZeRO checkpoint\. It holds global_step4"
    ):
        find_partitions(tmp_path)
    (tmp_path / "latest").unlink()
    shutil.rmtree(second)
    assert find_partitions(tmp_path) == first


@pytest.mark.parametrize("tag", ["..", ".", "", "../other/global_step4", "/etc", r"..\other", "a/../../other"])
def test_latest_leads_nowhere_else(tag, tmp_path):
    partitions(tmp_path / "other")
    partitions(tmp_path / "run")
    (tmp_path / "run/latest").write_text(tag)
    with pytest.raises(CheckpointError, match=r"`.*latest` names `.*which (is not a folder beside|holds no)"):
        find_partitions(tmp_path / "run")


def test_folders_of_other_things_hold_no_partitions(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "latest").mkdir()
    assert find_partitions(tmp_path) is None


# What two processes wrote. With `make test-distributed`, which installs DeepSpeed.

SETUPS = ["zero1", "zero2", "zero2-tied", "zero3", "zero3-tied"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed.")
    folder = tmp_path_factory.mktemp("zero")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ran = subprocess.run(
        [*launcher, "-m", "tests.make.zero_run", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


@pytest.fixture(params=SETUPS)
def setup(request):
    return request.param


@pytest.fixture
def place(written, setup, tmp_path):
    """A copy of one of them, to be changed at will."""
    return shutil.copytree(written / setup, tmp_path / setup)


def test_tensors_come_out_as_the_optimizer_holds_them(written, setup, capfd):
    checkpoint = open_checkpoint(written / setup)
    assert isinstance(checkpoint, Checkpoint)
    truth = load_file(written / f"{setup}.safetensors")
    assert same(checkpoint, truth)
    assert {name: header.dtype for name, header in checkpoint.headers.items()} == {n: t.dtype for n, t in truth.items()}
    assert ("lm_head.weight" in checkpoint.headers) == (not setup.endswith("tied"))
    assert checkpoint.config["model_type"] == "llama"
    # Machines read our JSON on stdout.
    assert capfd.readouterr().out == ""


def test_the_folder_itself_may_be_given(place):
    for given in (place, place / "global_step2"):
        checkpoint = open_checkpoint(given)
        assert checkpoint.config["model_type"] == "llama"
        assert json.loads(json.dumps(checkpoint.identity)) == open_checkpoint(place).identity
    before = open_checkpoint(place).identity
    os.utime(next((place / "global_step2").glob("*optim*")), (1, 1))
    assert open_checkpoint(place).identity != before


def test_the_adapter_from_partitions_is_that_from_whole_weights(written, setup, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copy(written / f"{setup}.safetensors", whole / "model.safetensors")
    shutil.copy(written / setup / "config.json", whole)
    torch.manual_seed(0)
    changes = {"tie_word_embeddings": True} if setup.endswith("tied") else {}
    base = models.save(models.llama(vocab_size=97, intermediate_size=49, **changes), tmp_path / "base")
    expected, found = (extract(base, tuned, 4).factors for tuned in (whole, written / setup))
    assert len(expected) == 14
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, y) for name in expected for x, y in zip(found[name], expected[name], strict=True))


@pytest.mark.parametrize("kind", ["*optim_states.pt", "*model_states.pt"])
def test_nothing_in_a_pickle_runs(kind, place, tmp_path):
    marker = tmp_path / "ran"
    file = next((place / "global_step2").glob(kind))
    poison(file, marker)
    with pytest.raises(
        CheckpointError, match=r"is refused: a pickle .* Nothing of it was executed\..*zero_to_fp32\.py"
    ):
        open_checkpoint(place)
    assert not marker.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    # Left to itself, DeepSpeed's converter runs it.
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    get_fp32_state_dict_from_zero_checkpoint(str(place), lazy_mode=True)
    assert marker.exists()


class Payload:
    """When it is unpickled by anything but a careful reader, a folder appears."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def poison(file, marker):
    """Put an object that runs a command when it is unpickled into a file of tensors."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in parts if name.endswith("/data.pkl"))
    # The value is made, and dropped: what the file holds does not change.
    parts[name] = b"\x80\x02" + pickle.dumps(Payload(marker), 2)[2:-1] + b"0" + parts[name][2:]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def test_partitions_that_another_node_kept_are_missed(place):
    first, *_ = sorted((place / "global_step2").glob("*optim_states.pt"))
    first.unlink()
    with pytest.raises(CheckpointError, match=r"Expected 2 of '\*_optim_states\.pt'.* Give all files of all processes"):
        open_checkpoint(place)


def test_a_file_that_is_cut_off_is_told(place):
    for file in sorted((place / "global_step2").glob("*optim_states.pt")):
        file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=re.escape(f"`{place}`")):
        open_checkpoint(place)
