"""What a process that is killed while it writes leaves, and what becomes of it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peft_posthoc.files import staged, write_whole
from peft_posthoc.room import room_beside
from tests.make.limits import HANG

FOLDER = """
from peft_posthoc.files import staged
with staged("out", what="It") as made:
    made.mkdir()
    (made / "weights").write_text("half")
    wait()
"""
FILE = """
import os
from peft_posthoc.files import write_whole
os.fsync = lambda _: wait()
write_whole("out", "half")
"""
WAITS = """
import sys, time
def wait():
    print("in the middle", flush=True)
    time.sleep(600)
"""


def begun(code: str, place: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of writing `out`."""
    process = subprocess.Popen([sys.executable, "-c", WAITS + code], cwd=place, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in the middle\n"
    return process


def killed(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=HANG)


def write_folder(place: Path) -> None:
    with staged(place, what="It") as made:
        made.mkdir()


@pytest.mark.parametrize("code", [FOLDER, FILE], ids=["a folder", "a file"])
@pytest.mark.parametrize("again", [write_folder, lambda place: write_whole(place, "whole")], ids=["folder", "file"])
def test_what_a_killed_process_left_goes_and_what_a_living_one_makes_stays(code, again, tmp_path):
    killed(begun(code, tmp_path))
    (left,) = tmp_path.iterdir()
    living = begun(code, tmp_path)
    (made,) = set(tmp_path.iterdir())  # That of the killed one is gone already.
    assert made != left
    again(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", made.name}
    killed(living)
    with room_beside(tmp_path / "out"):
        assert not made.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_what_is_no_room_or_holds_what_was_there_before_stays(tmp_path):
    killed(begun(FOLDER, tmp_path))
    (left,) = tmp_path.iterdir()
    (left / "old").mkdir()
    elsewhere = left.name.replace(left.suffixes[-2], ".0123abcd")  # another machine's
    for name in (".out.settings", ".out.settings.phlora", ".out.12345678.phlora", elsewhere):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("years of work")
    before = set(tmp_path.rglob("*"))
    write_whole(tmp_path / "out", "whole")
    assert set(tmp_path.rglob("*")) == {*before, tmp_path / "out"}


def test_where_nothing_can_be_locked_writing_goes_on(tmp_path, monkeypatch):
    killed(begun(FOLDER, tmp_path))
    (left,) = tmp_path.iterdir()

    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    write_whole(tmp_path / "out", "whole")
    write_folder(tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "folder", left.name}


def test_processes_that_write_the_same_place_at_once_leave_each_other_their_rooms(tmp_path):
    code = """
import time
from peft_posthoc.files import write_whole
until = time.monotonic() + 2
while time.monotonic() < until:
    write_whole("out", "whole")
"""
    writing = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) for _ in range(4)]
    assert [process.wait(HANG) for process in writing] == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
