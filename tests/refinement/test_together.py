"""Two processes that refine together: one result, that of one process; one writes, one tells what went wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_posthoc import extract, refine
from tests.make.launched import launched, torchrun


@pytest.fixture(scope="module")
def adapter(llama_pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract(*llama_pair, 2, dtype=torch.float32).save(tmp_path_factory.mktemp("together") / "svd")


def test_two_processes_extract_and_refine_what_one_does(
    llama_pair: tuple[str, str], adapter: Path, tmp_path: Path
) -> None:
    # A last batch of one text: one of them has nothing to do.
    text = ["--refine", "--sequences", 45, "--length", 12]
    ran = launched(
        "tests.make.refine_run", "extract", *llama_pair, tmp_path / "out", "--rank", 2, "--dtype", "float32", *text
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = sorted(line for line in ran.stdout.splitlines() if line.startswith("found"))
    assert len(found) == 2
    assert found[0] == found[1]
    assert ran.stdout.count("Adapter written") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    alone = refine(adapter, *llama_pair, sequences=45, length=12)
    assert not alone.kept
    assert sum(alone.texts.values()) % 8 == 1
    before = load_file(adapter / "adapter_model.safetensors")
    for name, x in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        moved = (alone.tensors[name] - before[name]).abs().max()
        assert (x - alone.tensors[name]).abs().max() <= 1e-3 * moved


@pytest.mark.parametrize("method", ["distil", "blocks", "compensated"])
def test_the_first_one_s_clock_is_that_of_both(
    llama_pair: tuple[str, str], adapter: Path, tmp_path: Path, method: str
) -> None:
    """The second one would judge less often, or not fit at all: each would wait for what the other never says."""
    models = ["--base", llama_pair[0], "--tuned", llama_pair[1]]
    options = ["--method", method, "--minutes", "2", "--sequences", 45, "--length", 12, "--quiet"]
    ran = launched("tests.make.refine_run", "refine", adapter, tmp_path / "out", *models, *options, LATE="1")
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = sorted(line for line in ran.stdout.splitlines() if line.startswith("found"))
    assert len(found) == 2
    assert found[0] == found[1]
    assert int(found[0].split()[2]) > 1


@pytest.mark.parametrize(
    ("run", "fail", "more", "told"),
    [
        (launched, "1", [], "It is too dark here. (In process 1 of 2.)"),
        (torchrun, "disk", [], "The disk is full."),
        (launched, "", ["--prefix", "a"], "Neither the tuned model nor the base has a tokenizer"),
    ],
    ids=["in one", "in the first, which alone keeps", "in both"],
)
def test_what_goes_wrong_ends_both_with_one_line(
    llama_pair: tuple[str, str], adapter: Path, tmp_path: Path, run: Any, fail: str, more: list[str], told: str
) -> None:
    models = ["--base", llama_pair[0], "--tuned", llama_pair[1]]
    options = ["--sequences", 32, "--length", 12, "--quiet", *more]
    ran = run("tests.make.refine_run", "refine", adapter, tmp_path / "out", *models, *options, FAIL=fail)
    assert ran.returncode != 0
    lines = [line for line in ran.stderr.splitlines() if line.startswith("phlora:")]
    assert len(lines) == 1
    assert lines[0].startswith(f"phlora: error: {told}")
    assert "[rank" not in ran.stderr  # No traceback of the other one.
    assert not list(tmp_path.iterdir())
