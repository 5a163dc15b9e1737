"""Pipes where a file should be: one line, and nobody waits for what never comes."""

import contextlib
import errno
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from peft_posthoc import CheckpointError, extract, verify
from peft_posthoc.files import check_folder, regular
from tests.make.spoiled import moved, refused, run, tensors, write


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder that commands run in: `base`, `tuned`, and the adapter between them."""
    write(tmp_path / "work" / "base", tensors())
    write(tmp_path / "work" / "tuned", moved(tensors()))
    monkeypatch.chdir(tmp_path / "work")
    extract("base", "tuned", 2).save("adapter")
    return tmp_path / "work"


@contextlib.contextmanager
def pipe(path):
    """A pipe in a file's place. Who reads it after all finds it empty: a test must not hang where it should fail."""
    path = Path(path)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    over = threading.Event()

    def feed():
        while not over.is_set():
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            except OSError as error:
                if error.errno not in (errno.ENXIO, errno.ENOENT):
                    raise
            time.sleep(0.01)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        yield
    finally:
        over.set()
        feeder.join()


MODEL = ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", MODEL)
@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("command", ["extract", "inspect", "verify"])
def test_a_pipe_in_a_model_s_folder(command, side, name, work):
    arguments = {
        "extract": ["extract", "base", "tuned", "out"],
        "inspect": ["inspect", "base", "tuned"],
        "verify": ["verify", "adapter", "--base", "base", "--tuned", "tuned", "--weights-only"],
    }[command]
    with pipe(Path(side, name)):
        refused(run(*arguments), f"{side}/{name}`", "a named pipe, not a regular file")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin"])
def test_a_pipe_for_an_index_or_a_pickle(name, work):
    Path("base/model.safetensors").unlink()
    with pipe(Path("base", name)):
        refused(run("extract", "base", "tuned", "out"), f"`base/{name}`", "a named pipe")


def test_a_pipe_for_a_single_file_of_weights(work):
    with pipe("weights.safetensors"):
        refused(run("extract", "weights.safetensors", "tuned", "out"), "`weights.safetensors` is no regular file")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_pipe_for_the_metadata_of_shards(work):
    shutil.rmtree("base")
    dcp.save(tensors(), checkpoint_id="base", no_dist=True)
    with pipe("base/.metadata"):
        refused(run("extract", "base", "tuned", "out"), "`base/.metadata` cannot be read", "a named pipe")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "adapter"],
        ["check", "adapter", "--fix", "out"],
        ["resize", "adapter", "out", "--rank", "1"],
        ["combine", "adapter", "adapter", "out"],
        ["export", "adapter", "out", "--to", "merged", "--base", "base"],
        ["verify", "adapter", "--base", "base", "--tuned", "tuned", "--weights-only"],
        ["extract", "base", "base+adapter", "out"],
    ],
    ids=" ".join,
)
def test_a_pipe_in_an_adapter_s_folder(arguments, name, work):
    with pipe(Path("adapter", name)):
        line = run(*arguments)[2]
        assert "a named pipe, not a regular file" in line or "is no adapter" in line
        assert len(line.splitlines()) == 1


def test_a_pipe_where_an_export_is_to_go(work):
    with pipe("out.gguf"):
        refused(run("export", "adapter", "out.gguf", "--to", "gguf", "--force"), "`out.gguf` exists")
    Path("out").mkdir()
    with pipe("out/phlora_report.json"):
        refused(run("export", "adapter", "out", "--to", "mlx", "--force"), "`out` is no earlier export")


def test_a_pipe_with_the_name_of_an_adapter_s_card_or_report(work):
    with pipe("adapter/README.md"):
        assert run("extract", "base", "tuned", "adapter", "--force")[0] == 0
        assert Path("adapter/README.md").is_fifo()
    with pipe("adapter/phlora_report.json"):
        refused(run("extract", "base", "tuned", "adapter", "--force"), "adapter/phlora_report.json` is not the file")


def test_a_pipe_that_only_a_host_library_would_open(work):
    for name in ("tokenizer.json", "generation_config.json"):
        with pipe(Path("base", name)), pytest.raises(CheckpointError, match=rf"`base/{name}` cannot be read: .*pipe"):
            check_folder("base")
        Path("base", name).unlink()
    check_folder("base")


def test_a_pipe_among_a_tokenizer_s_files(llama_pair, tmp_path):
    base, tuned = (shutil.copytree(folder, tmp_path / Path(folder).name) for folder in llama_pair)
    extract(base, tuned, 2).save(tmp_path / "adapter")
    for folder in (tuned, base):
        with pipe(folder / "tokenizer.json"):
            assert "tokenizer.json` cannot be read: it is a" in verify(tmp_path / "adapter", base, tuned).failure


def test_options_may_still_be_read_from_a_pipe(work):
    os.mkfifo("ranks")
    writer = threading.Thread(target=Path("ranks").write_text, args=('{"proj": 1}',))
    writer.start()
    assert run("extract", "base", "tuned", "out", "--rank-pattern", "ranks")[0] == 0
    writer.join()


def test_devices_and_sockets_are_no_files_either(tmp_path):
    with pytest.raises(OSError, match="it is a device"):
        regular(Path("/dev/null"))
    with pytest.raises(FileNotFoundError):
        regular(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("there")
    assert regular(tmp_path / "link").read_text() == "there"
