import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.make.fake_hub import FakeHub, environment
from tests.make.hub_session import SESSION
from tests.make.limits import HANG


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


@pytest.fixture(scope="module")
def served():
    hub = FakeHub()
    with hub.serve() as address:
        yield hub, address


@pytest.fixture
def hub(served):
    hub, _ = served
    hub.fetched.clear()
    hub.begun.clear()
    hub.parts.clear()
    hub.tags.clear()
    hub.drops = lambda count: False
    hub.asked.clear()
    return hub


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """The folder of the hub's cache, and of files that are there for a while."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def phlora(served, homes):
    """Run the command against the fake hub: (exit status, stdout, stderr)."""
    _, address = served
    process = subprocess.Popen(
        [sys.executable, "-c", SESSION],
        env={**environment(address, homes), "TMPDIR": str(homes)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(*arguments):
        process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        process.stdin.flush()
        status, stdout, stderr, crash = json.loads(process.stdout.readline())
        assert crash is None, crash
        return status, stdout, stderr

    yield run
    process.stdin.close()
    assert process.wait(timeout=HANG) == 0
    process.stdout.close()


@pytest.fixture
def pair(tmp_path):
    """(base, tuned) folders of a model whose classes nobody knows."""
    base = {f"layers.{i}.proj.weight": torch.randn(24, 16) for i in range(3)}
    tuned = {name: weight + 0.01 * torch.randn(24, 16) for name, weight in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path / "base", tmp_path / "tuned"


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"
