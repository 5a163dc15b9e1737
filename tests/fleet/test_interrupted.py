"""A fleet that is killed, and one that several processes share."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from peft_posthoc import extract, extract_many
from tests.fleet.test_extract_many import same
from tests.make import models
from tests.make.limits import HANG


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str], Path]:
    """A base, six fine-tunes of it, one of which cannot be used, and the adapters of the others, each by itself."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fleet")
    model = models.llama()
    base = str(models.save(model, folder / "base"))
    tuned = [str(models.save(models.tuned_from(model), folder / f"tuned-{at}")) for at in range(6)]
    for one in tuned[:5]:
        extract(base, one, 4).save(folder / "single" / Path(one).name)
    broken = models.load(tuned[5])
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    models.save(broken, tuned[5])
    return base, tuned, folder / "single"


def all_there(out: Path, single: Path) -> None:
    for one in sorted(single.iterdir()):
        assert same(out / one.name, one)
    # Nothing but them, and the note of what was made: no finished layers, no half folder.
    assert {path.name for path in out.iterdir()} == {*(one.name for one in single.iterdir()), ".phlora_fleet.json"}


# Every weight takes a while, so that a kill comes in the middle.
SLOW = """
import sys, time
from peft_posthoc.cli.main import main
from peft_posthoc.extraction import work
import peft_posthoc.fleet.extract_many as many
real, save = work.truncated_svd, many._save
def svd(*args, **kwargs):
    time.sleep(0.02)
    return real(*args, **kwargs)
work.truncated_svd = svd
def slowly(*args, **kwargs):
    save(*args, **kwargs)
    time.sleep(0.1)
many._save = slowly
sys.stdout.write("ready\\n")
sys.stdout.flush()
main(prog_name="phlora")
"""


def test_a_fleet_that_is_killed_at_any_moment_goes_on(fleet, tmp_path: Path) -> None:
    base, tuned, single = fleet
    out, draw, kills = tmp_path / "all", random.Random(0), 0
    arguments = ["extract", base, *tuned, "--out", str(out), "--rank", "4", "--quiet"]
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0.1, 1.5))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait(HANG)
        process.stdout.close()
    assert kills
    done = extract_many(base, tuned, 4, out=out)
    assert [one.name for one in done.failed] == ["tuned-5"]
    all_there(out, single)


def test_what_is_left_beside_an_adapter_that_was_whole_goes_too(fleet, tmp_path: Path) -> None:
    base, tuned, _ = fleet
    extract_many(base, tuned[:1], 4, out=tmp_path / "all")
    before = {path.name for path in (tmp_path / "all").iterdir()}
    killed = """
import os, signal, sys
from pathlib import Path
from peft_posthoc.room import room_beside
with room_beside(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", killed, str(tmp_path / "all" / "tuned-0")], check=False, timeout=HANG)
    assert len(list((tmp_path / "all").iterdir())) == len(before) + 1
    extract_many(base, tuned[:1], 4, out=tmp_path / "all")
    assert {path.name for path in (tmp_path / "all").iterdir()} == before


def launched(*arguments: object, port: int = 0, node: int = 0, nodes: int = 1) -> subprocess.Popen[str]:
    where = ["--standalone"] if nodes == 1 else [f"--nnodes={nodes}", f"--node-rank={node}", f"--master-port={port}"]
    where += [] if nodes == 1 else ["--master-addr=127.0.0.1"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node=2", "-m", "peft_posthoc"]
        + [str(argument) for argument in arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def test_two_groups_of_processes_share_a_fleet_and_what_fails_in_one_is_a_row(fleet, tmp_path: Path) -> None:
    base, tuned, single = fleet
    port, out = free_port(), tmp_path / "all"
    groups = [
        launched("extract", base, *tuned, "--out", out, "--rank", "4", port=port, node=node, nodes=2)
        for node in range(2)
    ]
    told = [group.communicate(timeout=HANG) for group in groups]
    shown = "".join(one for one, _ in told)
    assert "5 of 6 fine-tunes have an adapter" in shown, told
    assert "NaN" in shown
    assert shown.count("fine-tunes have an adapter") == 1
    all_there(out, single)


KILLED = """
import os, signal
from peft_posthoc.cli.main import main
from peft_posthoc.extraction import work
real, calls = work.truncated_svd, []
def svd(*args, **kwargs):
    calls.append(None)
    if len(calls) == 12 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
work.truncated_svd = svd
main(prog_name="phlora")
"""


def test_a_process_of_a_fleet_that_is_killed_is_started_again_and_goes_on(fleet, tmp_path: Path) -> None:
    base, tuned, single = fleet
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = ["--no-python", sys.executable, "-c", KILLED, "extract", base, *tuned[:5], "--out", str(tmp_path / "all")]
    ran = subprocess.run(
        [*launcher, *command, "--rank", "4"], capture_output=True, text=True, timeout=HANG, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "5 of 5 fine-tunes have an adapter" in ran.stdout
    all_there(tmp_path / "all", single)
