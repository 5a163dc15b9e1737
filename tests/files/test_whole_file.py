"""Files beside an adapter: whole or as they were, and what is told of the adapter where one cannot be written."""

import ast
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from peft_posthoc import Inspection, extract
from peft_posthoc.cli import main as cli
from peft_posthoc.errors import OutputError
from peft_posthoc.files import write_whole

ROOT = Path(__file__).parents[2]
FULL = "/dev/full"
full_device = pytest.mark.skipif(not Path(FULL).exists(), reason="there is no such device")


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(one) for one in arguments])


@pytest.fixture
def full_disk():
    """From now on no file gets larger than this, as on a disk with no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def adapter(llama_pair, tmp_path):
    return extract(*llama_pair, 4).save(tmp_path / "adapter")


def test_a_file_that_does_not_fit_leaves_what_was_there(full_disk, tmp_path):
    (tmp_path / "there").write_bytes(b"before")
    full_disk(1000)
    for name in ("there", "new"):
        with pytest.raises(OutputError, match=rf"`.*/{name}` could not be written: File too large\."):
            write_whole(tmp_path / name, b"x" * 2000)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_bytes() == b"before"


def test_a_file_keeps_its_mode_and_a_link_stays_a_link(tmp_path):
    (tmp_path / "file").write_bytes(b"before")
    (tmp_path / "file").chmod(0o640)
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", "größer")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text(encoding="utf-8") == "größer"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["there.json", "new.json"])
def test_json_is_written_whole_or_not_at_all(name, llama_pair, full_disk, tmp_path):
    (tmp_path / "there.json").write_text("{}")
    full_disk(3000)
    result = run("inspect", *llama_pair, "--json", tmp_path / name, "--quiet")
    assert result.exit_code == 1
    assert result.stderr == f"phlora: error: `{tmp_path / name}` could not be written: File too large.\n"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"there.json": "{}"}


LATER = {
    "extract --html": ("The adapter is", ["extract", "{base}", "{tuned}", "{out}", "--html", FULL]),
    "extract --json": ("The adapter is", ["extract", "{base}", "{tuned}", "{out}", "--json", FULL]),
    "a series": ("The adapters are", ["extract", "{base}", "{tuned}", "{out}", "--rank", "2,4", "--json", FULL]),
    "resize": ("The adapter is", ["resize", "{adapter}", "{out}", "--rank", "2", "--json", FULL]),
    "combine": ("The adapter is", ["combine", "{adapter}", "{adapter}", "{out}", "--json", FULL]),
    "check --fix": ("The adapter is", ["check", "{adapter}", "--fix", "{out}", "--json", FULL]),
    "export": ("The export is", ["export", "{adapter}", "{out}", "--to", "mlx", "--base", "{base}", "--json", FULL]),
}


@full_device
@pytest.mark.parametrize("case", LATER)
def test_a_file_that_fails_after_the_adapter_says_so_and_where_the_adapter_is(case, llama_pair, adapter, tmp_path):
    told, line = LATER[case]
    places = {"base": llama_pair[0], "tuned": llama_pair[1], "adapter": adapter, "out": tmp_path / "out"}
    result = run(*(part.format(**places) for part in line), "--quiet")
    assert result.exit_code == 1
    assert result.stderr == (
        f"phlora: error: `{FULL}` could not be written: No space left on device. {told} at `{tmp_path / 'out'}`.\n"
    )
    assert (tmp_path / "out").exists()


def test_a_page_that_cannot_be_drawn_says_so_and_where_the_adapter_is(llama_pair, tmp_path, monkeypatch):
    def crash(_):
        raise RuntimeError("no font")

    monkeypatch.setattr("peft_posthoc.inspection.inspection.page", crash)
    result = run("extract", *llama_pair, tmp_path / "out", "--html", tmp_path / "page.html", "--quiet")
    assert result.stderr == (
        "phlora: error: Unexpected RuntimeError (see it with --debug): no font. "
        f"`{tmp_path / 'page.html'}` was not written. The adapter is at `{tmp_path / 'out'}`.\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_interruption_after_the_adapter_does_not_say_that_nothing_was_written(llama_pair, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Inspection, "html", interrupt)
    result = run("extract", *llama_pair, tmp_path / "out", "--html", tmp_path / "page.html", "--quiet")
    assert result.exit_code == 130
    assert result.stderr == f"phlora: error: Interrupted. The adapter is at `{tmp_path / 'out'}`.\n"


def test_of_a_series_it_is_told_what_is_there(llama_pair, full_disk, tmp_path):
    adapter = extract(*llama_pair, 16)
    one = adapter.at(2).save(tmp_path / "small") / "adapter_model.safetensors"
    full_disk(one.stat().st_size + 20_000)
    result = run("extract", *llama_pair, tmp_path / "out", "--rank", "2,16", "--quiet")
    assert result.exit_code == 1
    assert result.stderr.endswith(f"Nothing was left there. `{tmp_path / 'out/r2'}` is written.\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["r2"]


@full_device
def test_of_two_files_of_an_inspection_it_is_told_which_is_there(llama_pair, tmp_path):
    result = run("inspect", *llama_pair, "--plot", tmp_path / "plot.png", "--html", FULL, "--quiet")
    assert result.stderr.endswith(f"No space left on device. `{tmp_path / 'plot.png'}` is written.\n")


# Standard output, which click's runner has none of its own.


def piped(folder, *command, **how):
    """A command with `--json -` in a process of its own: its exit status and what it says."""
    name, *rest = command or ["inspect"]
    line = [sys.executable, "-m", "peft_posthoc", name, "base.safetensors", "tuned.safetensors", *rest, "--json", "-"]
    done = subprocess.run(
        [*line, "--quiet"], cwd=folder, stderr=subprocess.PIPE, text=True, check=False, env=dict(os.environ), **how
    )
    return done.returncode, done.stderr


@pytest.fixture
def files(tmp_path):
    weights = {"model.layers.0.mlp.up_proj.weight": torch.randn(24, 16)}
    save_file(weights, tmp_path / "base.safetensors")
    save_file(
        {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in weights.items()},
        tmp_path / "tuned.safetensors",
    )
    return tmp_path


@full_device
def test_json_to_a_full_device_fails_in_one_line(files):
    with open(FULL, "w") as full:
        assert piped(files, stdout=full) == (
            1,
            "phlora: error: Standard output could not be written: No space left on device.\n",
        )


def test_a_reader_that_has_gone_does_not_keep_from_saying_where_the_adapter_is(files):
    reading, writing = os.pipe()
    os.close(reading)
    told = "phlora: error: Standard output could not be written: Broken pipe. The adapter is at `out`.\n"
    assert piped(files, "extract", "out", "--rank", "4", stdout=writing) == (1, told)
    os.close(writing)


def test_json_to_no_standard_output_fails_in_one_line(files):
    assert piped(files, preexec_fn=lambda: os.close(1)) == (1, "phlora: error: Standard output is closed.\n")


# The source itself.

# What these write lies in a folder that `staged` moves into its place when all is there.
STAGED = {"merged.py", "mlx.py", "result.py", "writer.py"}
# Into a temporary folder of their own, for libraries that read files.
TEMPORARY = {"gguf_header.py", "object_store.py"}
WRITES = re.compile(r"\.(write_text|write_bytes|dump)$")


def written_in(source):
    """The calls in a source that write a file bit by bit."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    texts = [(ast.unparse(call.func), ast.unparse(call)) for call in calls]
    return [
        text for name, text in texts if WRITES.search(name) or (name.endswith("open") and re.search(r"'[wax]b?'", text))
    ]


def test_no_other_file_of_the_source_writes_files():
    found = {
        path.name: calls
        for folder in ("peft_posthoc", "mergekit_plugin")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in {*STAGED, *TEMPORARY, "files.py"}
        and (calls := written_in(path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "call", ["path.write_text('')", "json.dump(value, file)", "open(path, 'w')", "path.open('wb')"]
)
def test_such_a_call_would_be_found(call):
    assert written_in(call) == [call]
