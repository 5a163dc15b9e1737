"""Files of shards that were not written by torch: nothing of them is executed."""

import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from tests.make.shards import SHARDS, edited, put_in_place_of_a_tensor, trained
from tests.make.spoiled import NAMES, Payload, contents, moved, refused, run, tensors


def test_the_good_sharded_checkpoint_is_good(work):
    status, stdout, stderr = run("extract", "base", "tuned", "out")
    assert status == 0, stderr
    assert "\nAdapter written to out\n" in stdout


class Call:
    """Pickles to a call of what has this name."""

    def __init__(self, module, name, *arguments):
        self.bytes = b"".join(
            [b"\x80\x04", *map(pickle_text, (module, name)), b"\x93(", *map(pickle_text, arguments), b"tR."]
        )


def pickle_text(text):
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("os", "system", ["touch executed"]),
        ("posix", "system", ["touch executed"]),
        ("builtins", "open", ["executed", "w"]),
        ("builtins", "eval", ["open('executed', 'w')"]),
        ("builtins", "getattr", ["text", "upper"]),
        ("pathlib", "Path", ["executed"]),
        ("pathlib", "os.system", ["touch executed"]),
        ("torch", "load", ["executed"]),
        ("torch", "os.system", ["touch executed"]),
        ("torch", "__name__", []),
        ("torch.serialization", "load", ["executed"]),
        ("torch.serialization", "os.system", ["touch executed"]),
        ("torch.distributed.checkpoint.metadata", "os.system", ["touch executed"]),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__", []),
        ("torch.distributed.checkpoint.filesystem", "os.system", ["touch executed"]),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter", ["executed"]),
        ("no_such_module", "function", []),
    ],
)
def test_metadata_that_calls_for_anything_else_is_refused_and_not_executed(module, name, arguments, work):
    (work / "tuned" / SHARDS / ".metadata").write_bytes(Call(module, name, *arguments).bytes)
    before = contents(work)
    says = f"`tuned/{SHARDS}/.metadata` is refused"
    refused(run("extract", "base", "tuned", "out"), says, f"{module}.{name}", "Nothing of it was executed")
    assert contents(work) == before


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_call_hidden_in_good_metadata_is_refused_and_not_executed(side, work):
    if side == "base":
        shutil.rmtree(work / "base")
        trained(work / "base", tensors())
    target = work.parent / "executed"

    def hide(metadata):
        metadata.storage_meta.modules = [Payload(target)]

    edited(work / side / SHARDS, hide)
    before = contents(work)
    says = f"`{side}/{SHARDS}/.metadata` is refused"
    refused(run("extract", "base", "tuned", "out"), says, "io.open", "Nothing of it was executed")
    assert contents(work) == before
    assert not target.exists()
    # The payload is a real one, and torch's own reader falls for it.
    dcp.FileSystemReader(work / side / SHARDS).read_metadata().storage_meta.modules[0].close()
    assert target.exists()


def test_metadata_cannot_change_what_reads_it(work, monkeypatch):
    # `BUILD` with a pair sets attributes of what lies below it, be that a class.
    class_of = b"\x80\x04" + pickle_text("torch.distributed.checkpoint.metadata") + pickle_text("Metadata") + b"\x93"
    size = b"\x80\x04ctorch\nSize\n"
    for what in (class_of, size):
        attack = what + b"N}" + pickle_text("__setstate__") + b"Ns\x86b."
        (work / "tuned" / SHARDS / ".metadata").write_bytes(attack)
        refused(run("extract", "base", "tuned", "out"), "is refused")
    shutil.rmtree(work / "tuned")
    trained(work / "tuned", moved(tensors()))
    assert run("extract", "base", "tuned", "out")[0] == 0


def test_a_malicious_shard_is_refused_and_not_executed(work):
    target = work.parent / "executed"
    buffer = put_in_place_of_a_tensor(work / "tuned" / SHARDS, Payload(target))
    before = contents(work)
    says = f"`tuned/{SHARDS}/__0_0.distcp` is refused"
    refused(run("extract", "base", "tuned", "out"), says, "Nothing of it was executed")
    assert contents(work) == before
    assert not target.exists()
    # The payload is a real one.
    buffer.seek(0)
    torch.load(buffer, weights_only=False)[0].close()
    assert target.exists()


@pytest.mark.parametrize(
    "place",
    [
        "{outside}/secret.distcp",
        "../outside/secret.distcp",
        "x/../../outside/secret.distcp",
        "./../outside/secret.distcp",
        "inside/secret.distcp",
        "..\\outside\\secret.distcp",
        "C:\\outside\\secret.distcp",
        "C:secret.distcp",
        "..",
        ".",
        "",
    ],
)
def test_metadata_cannot_name_a_file_elsewhere(place, work, monkeypatch):
    # The file it names is there and good wherever such a path can exist: only the refusal keeps it from being read.
    shards, outside = work / "tuned" / SHARDS, work / "tuned" / "outside"
    outside.mkdir()
    shutil.copy(shards / "__0_0.distcp", outside / "secret.distcp")
    (shards / "x").mkdir()
    shutil.copytree(outside, shards / "inside")
    place = place.format(outside=outside)

    def elsewhere(metadata):
        metadata.storage_data[MetadataIndex(f"model.{NAMES[1]}", [0, 0])].relative_path = place

    edited(shards, elsewhere)
    opened = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: opened.append(a) or load(*a, **k))
    before = contents(work)
    says = f"`tuned/{SHARDS}/.metadata` is refused"
    refused(run("extract", "base", f"tuned/{SHARDS}", "out"), says, f"in `{place}`", "not a file of its own folder")
    assert contents(work) == before
    assert opened == []

    # The same metadata is followed when the file lies beside it.
    place = "secret.distcp"
    edited(shards, elsewhere)
    shutil.copy(outside / "secret.distcp", shards)
    assert run("extract", "base", f"tuned/{SHARDS}", "out")[0] == 0
    assert opened
