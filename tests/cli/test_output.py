"""What goes to stdout and to stderr, and when."""

import io
import json
import sys

import pytest
from click.testing import CliRunner

from peft_posthoc.cli.main import main
from peft_posthoc.progress import _EVERY, progress_bar


def run(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)], prog_name="phlora")


@pytest.fixture
def adapter(llama_pair, tmp_path):
    assert run("extract", *llama_pair, tmp_path / "adapter", "--rank", 2, "--quiet").exit_code == 0
    return tmp_path / "adapter"


def test_quiet_leaves_the_warnings_on_stderr(llama_pair, tmp_path):
    result = run("extract", *llama_pair, tmp_path / "out", "--rank", 2, "--quiet")
    assert result.stdout == ""
    assert "Warning: " in result.stderr
    assert "head (carried with --head)" in result.stderr


def test_what_follows_json_is_the_file_only_if_it_is_called_so(llama_pair, adapter, tmp_path):
    result = run("extract", "--json", *llama_pair, tmp_path / "one", "--rank", 2)
    assert json.loads(result.stdout)["totals"]["rank"] == 2
    result = run("extract", "--json", tmp_path / "told.json", *llama_pair, tmp_path / "two", "--rank", 2)
    assert "weights at rank 2" in result.stdout
    assert json.loads((tmp_path / "told.json").read_text())["totals"]["rank"] == 2
    assert run("extract", f"--json={tmp_path / 'told'}", *llama_pair, tmp_path / "three", "--rank", 2).exit_code == 0
    assert (tmp_path / "told").is_file()
    assert json.loads(run("resize", "--json", adapter, tmp_path / "less", "--rank", 1).stdout)["totals"]["rank"] == 1


def test_the_verdict_is_followed_by_the_next_command_which_runs(llama_pair, tmp_path):
    import shlex

    result = run("extract", *llama_pair, tmp_path / "out", "--rank", 2)
    assert result.stdout.startswith("14 weights at rank 2")
    *_, last = result.stdout.splitlines()
    words = shlex.split(last.partition(": ")[2])
    assert words[0] == "phlora"
    assert run(*words[1:], "--weights-only").exit_code == 0


def test_a_log_has_a_line_a_minute_and_a_short_run_none(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = progress_bar(total=10, desc="Fitting", progress=True)
    bar._time = lambda: now[0]
    for _ in range(10):
        now[0] += _EVERY / 3
        bar.update()
    bar.close()
    lines = sys.stderr.getvalue().splitlines()
    assert 3 <= len(lines) <= 5
    assert all(line.startswith("Fitting: ") for line in lines)
    assert "\r" not in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress_bar(range(3), progress=True)) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    list(progress_bar(range(3), progress=True))
    assert "100%|" in sys.stderr.getvalue()
