"""Trouble while the adapter is written: there is the old one, the new one, or none."""

import errno
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from peft_posthoc.adapters import writer
from tests.make.limits import HANG
from tests.make.spoiled import (
    an_adapter_at,
    contents,
    refused,
    run,
    spawn,
)

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def weights_fail(patch, error):
    def save_file(_, path, **__):
        Path(path).write_bytes(b"half of")
        raise error

    patch.setattr(writer, "save_file", save_file)


def text_fails(name, patch, error):
    write_text = Path.write_text

    def failing(self, text, **how):
        if self.name != name:
            return write_text(self, text, **how)
        write_text(self, text[:10], **how)
        raise error

    patch.setattr(Path, "write_text", failing)


def move_fails(patch, error):
    rename = Path.rename
    failed = []

    def failing(self, target):
        if Path(target).name == "out" and not failed:
            failed.append(self)
            raise error
        return rename(self, target)

    patch.setattr(Path, "rename", failing)


@pytest.mark.parametrize("existing", ["no adapter", "an adapter"])
@pytest.mark.parametrize(
    ("step", "error"),
    [
        (weights_fail, NO_SPACE),
        (weights_fail, SafetensorError("I/O error: No space left on device (os error 28)")),
        (partial(text_fails, "adapter_config.json"), NO_SPACE),
        (partial(text_fails, "phlora_report.json"), NO_SPACE),
        (move_fails, NO_SPACE),
        (weights_fail, KeyboardInterrupt()),
        (partial(text_fails, "phlora_report.json"), KeyboardInterrupt()),
        (move_fails, KeyboardInterrupt()),
    ],
)
def test_when_writing_stops_halfway_out_is_what_it_was(existing, step, error, work, monkeypatch):
    if existing == "an adapter":
        an_adapter_at(work / "out")
    before = contents(work)
    with monkeypatch.context() as patch:
        step(patch, error)
        ran = run("extract", "base", "tuned", "out", "--force")
    if isinstance(error, KeyboardInterrupt):
        refused(ran, "Interrupted", status=130)
    else:
        refused(ran, "could not be written to `out`", "No space left on device", "Nothing was left")
    assert contents(work) == before
    assert run("extract", "base", "tuned", "out", "--force")[0] == 0


def test_a_limit_on_file_sizes_stands_for_a_full_disk(work):
    # The system refuses to write past 2 KB, less than the factors take: the write fails for real, in the middle.
    # Python 3.11 leaves the byte code of a module cut off where a file cannot grow, for everybody after it.
    limit = "import resource; sys.dont_write_bytecode = True; resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))"
    before = contents(work)
    process = spawn("extract", "base", "tuned", "out", before=limit, text=True)
    stdout, stderr = process.communicate(timeout=HANG)
    refused((process.returncode, stdout, stderr), "could not be written to `out`", "too large", "Nothing was left")
    assert contents(work) == before


def test_ctrl_c_in_the_middle_leaves_nothing(work):
    # LAPACK takes tens of milliseconds for each of these, so the bar moves for several seconds.
    many = {f"layers.{i}.proj.weight": torch.randn(320, 320) for i in range(60)}
    save_file(many, work / "base" / "model.safetensors")
    save_file({name: weight + 1 for name, weight in many.items()}, work / "tuned" / "model.safetensors")
    before = {path.name for path in work.iterdir()}
    terminal = "import sys; sys.stderr.isatty = lambda: True"
    process = spawn("extract", "base", "tuned", "out", "--exact", "--rank", "300", before=terminal, bufsize=0)
    seen = b""
    while not re.search(rb"Extracting: +[1-9]\d?%", seen):
        piece = process.stderr.read(256)
        assert piece, seen
        seen += piece
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=HANG)
    assert b"100%" not in stderr
    ran = (process.returncode, stdout.decode(), (seen + stderr).decode())
    refused(ran, "Interrupted", status=130)
    assert {path.name for path in work.iterdir()} == before


def test_parents_that_were_made_for_out_go_when_it_cannot_be_written(work, monkeypatch):
    before = contents(work)
    weights_fail(monkeypatch, NO_SPACE)
    refused(run("extract", "base", "tuned", "new/deep/out"), "No space left on device")
    assert contents(work) == before
