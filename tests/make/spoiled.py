"""Helpers of tests about spoiled input: what is run, and how it is refused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from peft_posthoc import extract
from peft_posthoc.cli import main as cli
from peft_posthoc.extraction import work as factor

NAMES = ["layers.0.proj.weight", "layers.1.proj.weight", "layers.1.norm.weight"]


def tensors(seed=0):
    """A small model's weights: two matrices and a norm."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(24, 16), (16, 24), (16,)]
    return {name: torch.randn(shape, generator=draw) for name, shape in zip(NAMES, shapes, strict=True)}


def moved(weights, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return {name: weight + 0.01 * torch.randn(weight.shape, generator=draw) for name, weight in weights.items()}


def write(where, weights):
    where.mkdir(parents=True)
    save_file(weights, where / "model.safetensors")
    return where


def contents(where):
    """Everything below a folder: hidden, broken and linked things too."""
    return {
        str(path.relative_to(where)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else path.stat().st_mode
        for path in Path(where).rglob("*")
    }


def run(*arguments):
    """The command in this process: (exit status, stdout, stderr). It may exit, and must not raise."""
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], prog_name="phlora")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def without_progress(stderr):
    """What a terminal would still show: of each line what was written last, and no progress bar."""
    shown = [line.rpartition("\r")[2] for line in stderr.split("\n")]
    return [line for line in shown if line.strip() and not re.match(r"\w+: +\d+%\|", line)]


def refused(ran, *fragments, status=1):
    """Assert that a run ended in one clear line; give the line."""
    code, stdout, stderr = ran
    assert code == status, stderr
    assert stdout == ""
    lines = without_progress(stderr)
    assert len(lines) == 1, stderr
    assert lines[0].startswith("phlora: error: ")
    assert len(lines[0]) < 1000
    for fragment in fragments:
        assert fragment in lines[0]
    return lines[0]


def misused(ran, *fragments):
    """The same for what click finds by itself: its own usage message, and its status."""
    code, stdout, stderr = ran
    assert (code, stdout) == (2, "")
    assert stderr.startswith("Usage: phlora ")
    assert "Traceback" not in stderr
    for fragment in fragments:
        assert fragment in stderr.splitlines()[-1]


class Payload:
    """When it is unpickled by anything but a careful reader, a file appears."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def forbid_svd(monkeypatch):
    def never(*_, **__):
        raise AssertionError("an SVD was started")

    monkeypatch.setattr(factor, "truncated_svd", never)


def spawn(*arguments, before="", **how):
    """The command in a process of its own."""
    # A shell starts what it puts in the background deaf to Ctrl-C, and that is inherited.
    hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = f"import runpy, sys\n{hear}\n{before}\nrunpy.run_module('peft_posthoc', run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", start, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how
    )


def an_adapter_at(out):
    extract(tensors(), moved(tensors(), seed=2), 2).save(out)
    return "exists and is not empty", "--force"
