import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.make import models
from tests.make.limits import HANG
from tests.make.shards import SAVE, trained
from tests.make.spoiled import moved, tensors


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


@pytest.fixture(scope="session")
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
        cwd=Path(__file__).parents[3],
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
