"""`docs/code.md` is about the code of today."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/code.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)


def lines_of(diff):
    file = None
    for line in diff.splitlines():
        if line.startswith("+++ "):
            file = line.removeprefix("+++ ")
        else:
            yield file, line.removeprefix("+")


@pytest.mark.parametrize(("file", "line"), [pair for diff in DIFFS for pair in lines_of(diff)])
def test_the_examples_are_lines_of_the_code(file, line):
    assert line in (ROOT / file).read_text(encoding="utf-8").splitlines()


def test_every_package_is_on_the_map():
    own = [path.parent for path in (ROOT / "peft_posthoc").glob("*/__init__.py")]
    names = {path.name for path in [*own, ROOT / "hf_callbacks", ROOT / "mergekit_plugin"]}
    assert names == set(re.findall(r"^\| `(\w+)/` \|", PAGE, re.MULTILINE))


def test_files_that_it_names_are_there():
    named = set(re.findall(r"`([\w/]+\.py)`", PAGE)) - {"test_contract.py"}  # There are several.
    assert len(named) > 20
    assert {
        name for name in named if not any((ROOT / above / name).is_file() for above in ("", "peft_posthoc"))
    } == set()
