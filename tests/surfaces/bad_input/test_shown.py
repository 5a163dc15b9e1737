"""What is seen of an error."""

import pytest

from peft_posthoc.extraction import work as factor
from tests.make.limits import HANG
from tests.make.spoiled import (
    refused,
    run,
    spawn,
)


def test_debug_shows_the_traceback_and_the_same_line(work):
    _, _, plain = run("extract", "base", "nowhere", "out")
    status, stdout, stderr = run("extract", "base", "nowhere", "out", "--debug")
    assert (status, stdout) == (1, "")
    assert "Traceback (most recent call last)" in stderr
    assert "CheckpointError" in stderr
    assert stderr.splitlines()[-1] == plain.strip()


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_that_nobody_foresaw_is_one_line_too(debug, work, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(factor, "truncated_svd", broken)
    ran = run("extract", "base", "tuned", "out", *["--debug"] * debug)
    if debug:
        assert ran[0] == 1
        assert "Traceback" in ran[2]
    else:
        refused(ran, "Unexpected RuntimeError", "--debug", "first line second line")
    assert not (work / "out").exists()


def test_a_real_process_says_the_same_as_the_command_in_this_one(work):
    (work / "base" / "model.safetensors").write_bytes(b"garbage")
    here = run("extract", "base", "tuned", "out")
    process = spawn("extract", "base", "tuned", "out", text=True)
    stdout, stderr = process.communicate(timeout=HANG)
    assert (process.returncode, stdout, stderr) == here
    refused(here, "base/model.safetensors")


def test_a_reader_that_has_seen_enough_is_no_error(work):
    process = spawn("inspect", "base", "tuned", "--quiet", "--json", text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=HANG) == 1
    process.stderr.close()
