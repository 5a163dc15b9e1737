"""What lies where an output goes: on every surface that replaces a folder, only the files of the earlier output go."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from peft_posthoc import extract, open_checkpoint, resize
from peft_posthoc.adapters import writer
from peft_posthoc.adapters.card import MARK as CARD_MARK
from peft_posthoc.adapters.card import REPORT
from peft_posthoc.adapters.config import CONFIG, WEIGHTS
from peft_posthoc.extraction.forms.layout import FileLayout
from tests.make.spoiled import contents, moved, refused, run, tensors, write

OURS = {CONFIG, WEIGHTS, REPORT}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder that commands run in: `base`, `tuned`, and an adapter at `out` with things of the user's in it."""
    write(tmp_path / "work" / "base", tensors())
    write(tmp_path / "work" / "tuned", moved(tensors()))
    monkeypatch.chdir(tmp_path / "work")
    extract("base", "tuned", 2).save("out")
    belongings(Path("out"))
    return tmp_path / "work"


def belongings(folder):
    (folder / "README.md").write_text("# My adapter")
    (folder / "logs").mkdir()
    (folder / "logs" / "events").write_text("step 1")
    (folder / "training_args.bin").write_bytes(b"arguments")
    (folder / "latest").symlink_to("logs")
    (folder / ".hidden").write_text("mine")


def extract_again():
    return run("extract", "base", "tuned", "out", "--rank", "4", "--force")[0]


def extract_by_name():
    extract("base", "tuned", 4).save("out", force=True)
    return 0


def resize_it():
    return run("resize", "out", "out", "--rank", "1", "--force")[0]


def resize_by_name():
    resize("out", 1).save("out", force=True)
    return 0


def combine_it():
    extract("base", "tuned", 1).save("other")
    code = run("combine", "other", "other", "out", "--weights", "0.5,1.5", "--force")[0]
    shutil.rmtree("other")
    return code


def fix_it():
    return run("check", "out", "--engine", "peft", "--fix", "out", "--dtype", "bfloat16", "--force")[0]


SURFACES = [extract_again, extract_by_name, resize_it, resize_by_name, combine_it, fix_it]


@pytest.mark.parametrize("replace", SURFACES)
def test_force_replaces_the_adapter_and_keeps_what_else_lies_there(replace, work):
    before = contents(work)
    assert replace() == 0
    after = contents(work)
    assert after.keys() == before.keys()
    changed = {name for name in before if after[name] != before[name]}
    assert f"out/{WEIGHTS}" in changed
    assert changed <= {f"out/{name}" for name in OURS}
    assert os.readlink("out/latest") == "logs"


def test_force_keeps_what_lies_in_each_folder_of_several_ranks(work):
    for rank in ("r2", "r4"):
        extract("base", "tuned", 2).save(f"several/{rank}")
        belongings(Path("several", rank))
    Path("several", "notes.txt").write_text("mine")
    before = contents(work)
    assert run("extract", "base", "tuned", "several", "--rank", "2,4", "--force")[0] == 0
    after = contents(work)
    assert after.keys() == before.keys()
    assert {Path(name).name for name in before if after[name] != before[name]} <= OURS


def test_only_a_card_of_ours_is_replaced_with_the_adapter(work):
    Path("out/README.md").write_text(f"# An adapter\n{CARD_MARK}\n")
    assert extract_again() == 0
    assert "# tuned as a LoRA adapter" in Path("out/README.md").read_text()


@pytest.mark.parametrize("name", ["README.md", "adapter_model.bin"])
def test_a_folder_that_has_the_name_of_a_file_of_ours_stays(name, work):
    Path("out/README.md").unlink()
    Path("out", name).mkdir()
    Path("out", name, "thesis.txt").write_text("years of work")
    assert extract_again() == 0
    assert Path("out", name, "thesis.txt").read_text() == "years of work"


def a_folder_named_as_the_report():
    Path("out", REPORT).unlink()
    Path("out", REPORT).mkdir()
    Path("out", REPORT, "thesis.txt").write_text("years of work")
    return f"`out/{REPORT}` is not the file that belongs there"


def weights_of_their_own():
    save_file({"mine": torch.zeros(1)}, "out/mine.safetensors")
    return "`mine.safetensors`"


def added_tokens():
    Path("out/added_tokens.json").write_text("{}")
    return "`added_tokens.json`"


def a_whole_model():
    torch.save(tensors(), "out/pytorch_model.bin")
    return "weights of a model (`pytorch_model.bin`)"


@pytest.mark.parametrize("put", [a_folder_named_as_the_report, weights_of_their_own, added_tokens, a_whole_model])
def test_what_would_spoil_the_adapter_is_named_and_left_alone(put, work, monkeypatch):
    says = put()
    before = contents(work)
    refused(run("extract", "base", "tuned", "out", "--force"), says)
    assert contents(work) == before


def test_the_current_directory_is_not_replaced(work, monkeypatch):
    monkeypatch.chdir("out")
    before = contents(work)
    refused(run("extract", "../base", "../tuned", ".", "--force"), "`.` is the current directory")
    empty = work / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    refused(run("extract", "../base", "../tuned", "."), "`.` is the current directory")
    empty.rmdir()
    assert contents(work) == before


def test_a_link_stays_one_and_what_it_leads_to_is_written(work):
    Path("link").symlink_to("out")
    before = contents(work / "out")
    assert run("extract", "base", "tuned", "link", "--rank", "4", "--force")[0] == 0
    assert os.readlink("link") == "out"
    after = contents(work / "out")
    assert after.keys() == before.keys()
    assert after[WEIGHTS] != before[WEIGHTS]


@pytest.mark.parametrize("tuned", ["out", "base+out"])
def test_what_is_read_is_not_replaced_by_what_is_made_of_it(tuned, work):
    config = (
        Path("out", CONFIG).read_text().replace('"base_model_name_or_path": null', '"base_model_name_or_path": "base"')
    )
    Path("out", CONFIG).write_text(config)
    before = contents(work)
    refused(run("extract", "base", tuned, "out", "--force"), "`out` is what the adapter is made from")
    assert contents(work) == before


def test_inputs_within_the_folder_of_the_adapter_stay(work):
    shutil.move("base", "out/base")
    shutil.move("tuned", "out/tuned")
    before = contents(work)
    assert run("extract", "out/base", "out/tuned", "out", "--rank", "4", "--force")[0] == 0
    after = contents(work)
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} == {f"out/{name}" for name in OURS}


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_what_cannot_be_moved_back_is_not_deleted(error, work, monkeypatch):
    rename, failed = Path.rename, []

    def failing(self, target):
        if self.name == "logs" and not failed:
            failed.append(self)
            raise error
        return rename(self, target)

    before = contents(work / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        ran = run("extract", "base", "tuned", "out", "--rank", "4", "--force")
    if isinstance(error, KeyboardInterrupt):
        assert ran[0] == 130
        assert contents(work / "out").keys() == before.keys()
        assert not list(work.glob(".out*"))
        return
    refused(ran, "`", "is written, but what else lay there could not be moved back", "Input/output error")
    (left,) = work.glob(".out.*/old")
    assert (left / "logs" / "events").read_text() == "step 1"
    assert {path.name for path in left.iterdir()} | {path.name for path in Path("out").iterdir()} == {
        name for name in before if "/" not in name
    }


def test_without_force_nothing_takes_the_place_of_what_came_in_the_meantime(work, monkeypatch):
    save = writer.save_file

    def meanwhile(*given, **named):
        save(*given, **named)
        Path("new").mkdir()
        Path("new", "another").write_text("faster")

    monkeypatch.setattr(writer, "save_file", meanwhile)
    refused(run("extract", "base", "tuned", "new"), "could not be written to `new`", "not empty")
    assert {path.name for path in Path("new").iterdir()} == {"another"}
    assert not list(work.glob(".new*"))


def test_a_relative_place_is_meant_from_where_the_call_was_made(work, monkeypatch):
    (work / "elsewhere").mkdir()
    adapter = extract("base", "tuned", 2)
    real = FileLayout.filled

    def tensors_from_elsewhere(self, *values):
        os.chdir(work / "elsewhere")
        return real(self, *values)

    monkeypatch.setattr(FileLayout, "filled", tensors_from_elsewhere)
    adapter.save("new")
    assert (work / "new" / WEIGHTS).is_file()
    assert not list((work / "elsewhere").iterdir())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["safetensors", "sharded by torch"])
def test_a_relative_source_is_meant_from_where_it_was_opened(form, work, monkeypatch):
    if form == "sharded by torch":
        shutil.rmtree("base")
        dcp.save(tensors(), checkpoint_id="base", no_dist=True)
    checkpoint = open_checkpoint("base")
    monkeypatch.chdir("/")
    for name, wanted in tensors().items():
        assert torch.equal(checkpoint.read(name), wanted)
