"""The serving benchmark's quick form: what it times is right, and the page has every row. No time is asserted."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setenv("OMP_NUM_THREADS", "1")
        before = set(sys.modules)
        command = importlib.import_module("serving").main
        done = CliRunner().invoke(
            command, ["--quick", "--no-vllm", "--work", str(folder), "--results", str(folder / "SERVING.md")]
        )
        # Their names are plain words, and another test may have its own.
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
                del sys.modules[name]
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def measured(work):
    return json.loads((work / "serving.json").read_text())


def test_mixed_batch_says_what_the_merged_models_say_and_not_what_the_base_says(measured):
    said = measured["engines"]["PEFT"]["said"]
    assert len(said["mixed"]) == 16  # two requests of each of eight tenants
    assert said["mixed"] == said["merged"]
    assert said["mixed"] != said["base"]


def test_page_has_every_row_of_peft(work):
    text = (work / "SERVING.md").read_text()
    tables = [[line for line in part.splitlines() if line.startswith("|")][2:] for part in text.split("\n## ")]
    assert [len(rows) for rows in tables] == [
        5,  # claims: load, throughput, merged, routed, memory
        6,  # bytes, reading, and four ways to load
        2,  # adapters and full models, two tenants
        2,  # one and two requests a tenant
        3,  # base, merged, routed
    ]
    assert "vLLM's rows are left out" in text
    assert "not run |" not in text


def test_every_table_is_rectangular(work):
    for part in (work / "SERVING.md").read_text().split("\n\n"):
        if part.startswith("|"):
            assert len({line.count("|") for line in part.splitlines()}) == 1


def test_bytes_are_those_of_the_files(work, measured):
    for kind, size in zip(("tuned", "adapters"), measured["bytes"], strict=True):
        assert size == sum(file.stat().st_size for file in (work / "serving-quick" / kind / "0").iterdir())
