"""The place of the adapter: what is there is left alone, or replaced where that is asked for."""

import pytest
import torch

from peft_posthoc.adapters import card
from tests.make.spoiled import (
    an_adapter_at,
    contents,
    forbid_svd,
    refused,
    run,
    write,
)


def a_file_at(out):
    out.write_text("mine")
    return "exists and is not a folder"


def a_full_folder_at(out):
    write(out, {"mine": torch.zeros(1)})
    return "exists and is not empty", "--force"


def a_link_to_nowhere_at(out):
    out.symlink_to("nowhere")
    return "exists and is not a folder"


@pytest.mark.parametrize("put", [a_file_at, a_full_folder_at, a_link_to_nowhere_at, an_adapter_at])
def test_what_is_at_out_is_left_alone_and_seen_before_any_svd(put, work, monkeypatch):
    says = put(work / "out")
    forbid_svd(monkeypatch)
    before = contents(work)
    refused(run("extract", "base", "tuned", "out"), "`out`", *([says] if isinstance(says, str) else says))
    assert contents(work) == before


@pytest.mark.parametrize("put", [a_file_at, a_full_folder_at, a_link_to_nowhere_at])
def test_force_replaces_nothing_but_an_adapter(put, no_svd, work):
    put(work / "out")
    before = contents(work)
    refused(run("extract", "base", "tuned", "out", "--force"), "`out`")
    assert contents(work) == before


def test_force_does_not_replace_the_base(no_svd, work):
    before = contents(work)
    refused(run("extract", "base", "tuned", "base", "--force"), "`base` is not an adapter folder", "--force")
    assert contents(work) == before


def test_force_replaces_an_adapter_by_the_new_one_and_nothing_of_the_old(work):
    an_adapter_at(work / "out")
    (work / "out" / "adapter_model.bin").write_bytes(b"old")
    (work / "out" / "README.md").write_text(f"old\n{card.MARK}\n")
    assert run("extract", "base", "tuned", "new", "--rank", "4")[0] == 0
    assert run("extract", "base", "tuned", "out", "--rank", "4", "--force")[0] == 0
    assert {path.name for path in (work / "out").iterdir()} == {path.name for path in (work / "new").iterdir()}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (work / "out" / name).read_bytes() == (work / "new" / name).read_bytes()
    assert {path.name for path in work.iterdir()} == {"base", "tuned", "out", "new"}


def test_force_deletes_nothing_that_is_no_part_of_an_adapter(work):
    an_adapter_at(work / "out")
    (work / "out" / "checkpoint-7").mkdir()
    (work / "out" / "checkpoint-7" / "log.txt").write_text("mine")
    (work / "out" / "README.md").write_text("mine")
    before = contents(work / "out")
    assert run("extract", "base", "tuned", "out", "--rank", "4", "--force")[0] == 0
    after = contents(work / "out")
    changed = {name for name in before if before[name] != after[name]}
    assert after.keys() == before.keys()
    assert changed == {"adapter_model.safetensors", "adapter_config.json", "phlora_report.json"}
    assert {path.name for path in work.iterdir()} == {"base", "tuned", "out"}


def test_out_below_a_file_cannot_be_written(work):
    (work / "file").write_text("mine")
    before = contents(work)
    refused(run("extract", "base", "tuned", "file/out"), "`file")
    assert contents(work) == before


def test_out_with_a_name_that_no_file_system_takes_cannot_be_written(work):
    before = contents(work)
    refused(run("extract", "base", "tuned", "x" * 300), "too long")
    assert contents(work) == before


def test_that_out_lies_below_a_file_is_seen_before_any_svd(no_svd, work):
    (work / "file").write_text("mine")
    refused(run("extract", "base", "tuned", "file/out"), "`file`")
