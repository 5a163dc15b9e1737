"""The README's blocks, run as printed, in a folder that holds a `base` and a `tuned`."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from click.testing import CliRunner

from peft_posthoc.cli import main as cli
from tests.make import models, trainer_runs

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = [(m[1], m[2]) for m in re.finditer(r"```(\w+)\n(.*?)```", README, re.DOTALL)]


@pytest.fixture
def here(llama_pair, tmp_path, monkeypatch):
    for folder in llama_pair:
        shutil.copytree(folder, tmp_path / Path(folder).name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_is_one_that_is_run_here():
    assert [language for language, _ in BLOCKS] == [
        *("sh", "sh", "sh", "python", "python", "python", "yaml", "sh", "sh", "bibtex"),
    ]


@pytest.mark.filterwarnings("ignore:.*(left out|base's norm)")  # toys
def test_the_python_blocks(here):
    for language, block in BLOCKS:
        if language == "python":
            exec(block, {"base_model": models.load("base"), **training()})
    assert (here / "adapter-from-python" / "adapter_model.safetensors").is_file()
    assert (here / "adapter-from-peft" / "adapter_model.safetensors").is_file()
    assert {path.name for path in (here / "run/phlora").iterdir()} >= {"step-1", "step-2", "final"}


def training():
    """What a reader has before the Trainer's block."""
    return {
        "Trainer": transformers.Trainer,
        "model": models.load("base"),
        "args": trainer_runs.arguments("run", max_steps=2, save_steps=1),
        "data": trainer_runs.examples(),
    }


def test_the_phlora_lines(here):
    lines = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("phlora ")]
    assert len(lines) == 7
    for line in lines:
        _, *arguments = shlex.split(line, comments=True)
        result = CliRunner().invoke(cli.main, arguments)
        assert result.exit_code == 0, result.output
    assert (here / "energy.png").is_file()
    assert (here / "adapter" / "phlora_report.json").is_file()


def test_the_mergekit_lines(here):
    (recipe,) = (block for language, block in BLOCKS if language == "yaml")
    (line,) = (line for _, block in BLOCKS for line in block.splitlines() if line.startswith("mergekit-phlora "))
    (here / "phlora.yml").write_text(recipe)
    run = subprocess.run(
        [sys.executable, "-m", "mergekit_plugin", *shlex.split(line, comments=True)[1:]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (here / "adapter-from-mergekit" / "adapter_model.safetensors").is_file()


def test_the_torchrun_line_of_the_concepts(here):
    page = (Path(__file__).parents[2] / "docs/concepts.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith("torchrun "))
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (here / "adapter-by-two" / "adapter_model.safetensors").is_file()


def test_the_make_lines_name_targets():
    targets = [line.split()[1] for _, block in BLOCKS for line in block.splitlines() if line.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        run = subprocess.run(
            ["make", "-n", target], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
        )
        assert run.returncode == 0, run.stderr


def test_the_extra_that_is_told_to_install_exists():
    from importlib import metadata

    assert {"plot", "mergekit"} <= set(metadata.metadata("peft-posthoc").get_all("Provides-Extra"))
    assert sys.version_info >= (3, 11)
