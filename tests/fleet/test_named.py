"""What fine-tunes may be given as, and what their adapters' folders are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_posthoc import CheckpointError, extract_many
from peft_posthoc.fleet.named import listed, named
from tests.make import models


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["org/one", "org/two"], ["one", "two"]),
        (["org/one", "other/one", "org/two"], ["org--one", "other--one", "two"]),
        (["runs/a/checkpoint-10", "runs/b/checkpoint-10/"], ["a--checkpoint-10", "b--checkpoint-10"]),
        (["/x/1/run/last", "/x/2/run/last"], ["1--run--last", "2--run--last"]),
        (["s3://bucket/tuned", "org/model/tuned.Q8_0.gguf"], ["tuned", "tuned.Q8_0"]),
        (["org/base+org/lora", "a/.hidden"], ["lora", "hidden"]),
    ],
)
def test_a_folder_is_called_by_as_much_of_the_name_as_tells_it_apart(given: list[str], names: list[str]) -> None:
    assert list(named(given)) == names
    assert list(named(given).values()) == given


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([], "no fine-tunes"),
        (["org/one", "org/one"], "given twice"),
        (["one", "./one"], "are called `one`"),
        ({"../one": "one"}, "cannot be the name"),
        ({".one": "one"}, "cannot be the name"),
    ],
)
def test_what_has_no_name_of_its_own_is_refused(given, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why):
        named(given)


def test_lists_are_read_and_what_is_no_list_is_told(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("# ours\n  org/one \n\norg/two\n")
    (tmp_path / "list.txt").write_text("org/three")
    (tmp_path / "empty.txt").write_text("# none\n")
    found = listed(["org/zero", f"@{tmp_path / 'list'}", str(tmp_path / "list.txt")], "base")
    assert found == ["org/zero", "org/one", "org/two", "org/three"]
    for given, why in ((f"@{tmp_path / 'absent'}", "cannot be read"), (str(tmp_path / "empty.txt"), "is empty")):
        with pytest.raises(CheckpointError, match=why):
            listed([given], "base")


def test_a_fine_tune_in_the_place_of_its_own_adapter_is_left_alone(tmp_path: Path) -> None:
    base, tuned = models.save_pair(models.llama(), tmp_path)
    before = {path.name: path.read_bytes() for path in Path(tuned).iterdir()}
    (failed,) = extract_many(base, [tuned], 4, out=tmp_path, force=True).failed
    assert "is what the adapter is made from" in failed.error
    assert {path.name: path.read_bytes() for path in Path(tuned).iterdir()} == before
