"""The blocks of docs/fleet.md, run as printed in a folder with a base and two fine-tunes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from peft_posthoc.cli.main import main
from tests.make import models

PAGE = (Path(__file__).parents[2] / "docs/fleet.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    model = models.llama()
    models.save(model, tmp_path / "base")
    for name in ("tuned-a", "tuned-b"):
        models.save(models.tuned_from(model), tmp_path / name)
    (tmp_path / "tunes.txt").write_text("tuned-a\ntuned-b  \n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_lines(here: Path) -> None:
    lines = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        done = CliRunner().invoke(main, shlex.split(line, comments=True)[1:])
        assert done.exit_code == 0, done.output
    assert {path.name for path in here.iterdir()} == {
        *("base", "tuned-a", "tuned-b", "tunes.txt"),
        *("adapters", "fleet.html", "fleet.json"),
    }


def test_the_python_block(here: Path) -> None:
    (block,) = (block for language, block in BLOCKS if language == "python")
    exec(block, {})
    assert (here / "adapters/tuned-b/adapter_model.safetensors").is_file()
    assert (here / "fleet.html").is_file()
