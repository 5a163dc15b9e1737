"""What is told before a fit is what it then takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from peft_posthoc import blocks, compensated, distil, extract
from peft_posthoc.cli.main import main
from peft_posthoc.refinement.preflight import refine_preflight
from tests.make import models
from tests.make.limits import HANG

MEASURED = r"""
import re, sys
from pathlib import Path
from peft_posthoc.cli.main import main
main(sys.argv[1:], standalone_mode=False)
# Of this program alone: `ru_maxrss` begins with what the process had that started it.
print(1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]))
"""


def test_memory_is_told_within_a_third(tmp_path: Path) -> None:
    sizes = {"vocab_size": 8192, "hidden_size": 192, "intermediate_size": 512, "max_position_embeddings": 128}
    pair = models.save_pair(models.llama(**sizes), tmp_path, scale=0.01)
    extract(*pair, 8).save(tmp_path / "svd")
    command = ["refine", str(tmp_path / "svd"), str(tmp_path / "out"), "--base", pair[0], "--tuned", pair[1]]
    options = ["--sequences", "24", "--length", "128", "--quiet"]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, *command, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told = refine_preflight(tmp_path / "svd", *pair, sequences=24, length=128)
    assert told.work_bytes is not None
    # The process alone is half a gigabyte; this is more.
    assert told.work_bytes > 1e8
    assert 0.67 < told.memory_bytes / int(ran.stdout) < 1.5


def test_a_block_at_a_time_needs_less_the_more_blocks_there_are(tmp_path: Path) -> None:
    pair = models.save_pair(models.llama(num_hidden_layers=16), tmp_path)
    extract(*pair, 2).save(tmp_path / "svd")
    whole, *parts = (
        refine_preflight(tmp_path / "svd", *pair, method=one) for one in (distil(), compensated(), blocks())
    )
    assert parts[0].work_bytes is not None
    for one in parts:
        assert one.models_bytes < 0.6 * whole.models_bytes


@pytest.mark.parametrize("make", [models.gpt2, models.llama, models.mixtral, models.laguna])
def test_numbers_texts_and_steps_are_told(tmp_path: Path, make: object) -> None:
    pair = models.save_pair(make(), tmp_path)  # type: ignore[operator]
    adapter = extract(*pair, 2, dtype=torch.float32)
    adapter.save(tmp_path / "svd")
    command = ["refine", str(tmp_path / "svd"), str(tmp_path / "out"), "--base", pair[0], "--tuned", pair[1]]
    ran = CliRunner().invoke(
        main, [*command, "--sequences", "80", "--length", "500", "--passes", "2", "--dry-run", "--json"]
    )
    assert ran.exit_code == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert not (tmp_path / "out").exists()
    assert told["length"] == 64  # What the models can read.
    assert told["steps"] == 2 * 72 / distil().size
    assert told["factors"] == sum(x.numel() for name, x in adapter.tensors().items() if ".lora_" in name)
    values = [sum(own.numel() for own in models.load(folder).parameters()) for folder in pair]
    assert told["models_bytes"] == 4 * sum(values)
    assert told["disk_bytes"] > 16 * told["factors"]


def test_blocks_say_what_they_take_at_least(tmp_path: Path) -> None:
    pair = models.save_pair(models.llama(), tmp_path)
    extract(*pair, 2).save(tmp_path / "svd")
    command = ["refine", str(tmp_path / "svd"), str(tmp_path / "out"), "--base", pair[0], "--tuned", pair[1]]
    ran = CliRunner().invoke(main, [*command, "--method", "blocks", "--dry-run"])
    assert "Memory: at least" in ran.stdout
