"""Options in messages are worded as whoever reads them gives options."""

import ast
import contextlib
import re
from pathlib import Path

import pytest

import peft_posthoc
from peft_posthoc import budget, extract, limited
from peft_posthoc.cli import main as cli
from peft_posthoc.errors import one_line
from peft_posthoc.extraction.request import OPTIONS
from peft_posthoc.ranks.rules import fixed
from peft_posthoc.ranks.words import LIMITS
from peft_posthoc.text import as_flag, asked, asked_on
from tests.make.spoiled import refused, run

LIBRARY = Path(peft_posthoc.__file__).parent
# By name: what asks in Python; on the command line; the option as Python, the command line and a merge say it.
FAULTS = {
    "include": (
        {"include": "nowhere"},
        "--include nowhere",
        "include='nowhere'",
        "--include nowhere",
        "--include nowhere",
    ),
    "rename": ({"rename": "a"}, "--map a", "rename='a'", "--map a", "--map a"),
    "vocab": ({"vocab": "extend"}, "--vocab extend", "form='peft'", "--form peft", "--form peft"),
    "experts": (
        {"experts": "per-expert", "form": "peft"},
        "--experts per-expert --form peft",
        "experts='fused'",
        "--experts fused",
        "--experts fused",
    ),
    "serve_as": (
        {"serve_as": "NoSuch"},
        "--serve-as NoSuch",
        "serve_as='NoSuch'",
        "--serve-as NoSuch",
        "--serve-as NoSuch",
    ),
    "budget": ({"rank": budget("9B")}, "--budget 9B", "size='9B'", "--budget 9B", "--budget 9B"),
    "to exclude": ({"rank": budget("9B")}, "--budget 9B", "exclude=...", "--exclude`", "--exclude`"),
    "limits": (
        {"rank": lambda: limited(fixed(1), most=4, least=8)},
        "--rank 1 --max-rank 4 --min-rank 8",
        "`most=4` is below `least=8`",
        "`--max-rank 4` is below `--min-rank 8`",
        "`max_rank: 4` is below `min_rank: 8`",
    ),
    "head": ({"include": "lm_head"}, "--include lm_head", "head=True", "--head", "head: true"),
    "force": ({}, "", "force=True", "--force", "--force"),
}


def fault(pair, options, out):
    options = {option: value() if isinstance(value, type(fault)) else value for option, value in options.items()}
    extract(*pair, **options).save(out)


@pytest.fixture
def taken(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    return out


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("surface", ["python", "mergekit"])
def test_a_caller_is_told_in_its_own_words(surface, name, llama_pair, taken):
    options, _, python, flag, yaml = FAULTS[name]
    within = contextlib.nullcontext() if surface == "python" else asked_on(surface)
    with within, pytest.raises((ValueError, peft_posthoc.PosthocError)) as raised:
        fault(llama_pair, options, taken)
    said = one_line(raised.value)
    assert {"python": python, "mergekit": yaml}[surface] in said
    assert flag == yaml or flag not in said  # What `parameters` of a merge have no key for is a flag there.


@pytest.mark.parametrize("name", FAULTS)
def test_the_command_line_is_told_in_flags(name, llama_pair, taken):
    _, given, python, flag, _ = FAULTS[name]
    _, _, said = run("extract", *llama_pair, taken if name == "force" else taken / "new", *given.split())
    assert flag in said
    assert python not in said


def test_after_a_command_python_speaks_python_again(llama_pair, tmp_path):
    refused(run("extract", *llama_pair, tmp_path / "out", "--include", "nowhere"), "--include nowhere", status=2)
    with pytest.raises(ValueError, match="include='nowhere'"):
        extract(*llama_pair, 4, include="nowhere")


def test_what_is_kept_in_a_report_is_the_same_wherever_it_was_made(llama_pair):
    reports = []
    for surface in ("python", "command line", "mergekit"):
        with asked_on(surface):
            report = extract(*llama_pair, 4, form="peft", exclude="embed").report.to_dict()
        reports.append([report["warnings"], report["notes"], [row["reason"] for row in report["rows"]]])
    assert reports[0] == reports[1] == reports[2]


def test_a_value_is_quoted_as_the_surface_needs_it():
    pattern = r"^q\.b$"
    assert ast.literal_eval(asked("exclude", pattern).removeprefix("exclude=")) == pattern
    assert as_flag("exclude", pattern) == rf"--exclude '{pattern}'"
    with asked_on("mergekit"):
        assert asked("exclude", pattern) == as_flag("exclude", pattern)
        assert (asked("exact"), asked("most", 4), asked("rank", "auto")) == ("exact: true", "max_rank: 4", "rank: auto")
    assert as_flag("outputs", False) == "--weights-only"


def test_what_is_named_is_an_option_there():
    flags = {flag for option in cli.main.get_command(None, "extract").params for flag in option.opts}
    said = [
        "size",
        "params",
        "most",
        "least",
        "multiple",
        *(name for name in OPTIONS if name not in ("choose", "leave_out")),
    ]
    assert {as_flag(name) for name in said} <= flags
    with asked_on("mergekit"):
        limits = {asked(name, 1).partition(":")[0] for name in ("most", "least", "multiple")}
    assert limits == set(LIMITS)


# What speaks flags for a reason: data for shells, and texts that stand in tables of other programs' commands.
ELSEWHERE = (
    "cli/",
    "adapters/card.py",
    "serving/rules",
    "serving/engines.py",
    "checkpoints/zero.py",
    "pairing/differences.py",
)


def literals(path):
    """The strings of a module with their lines; docstrings, and strings that are a flag and nothing else, are none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.lineno, node.value


def test_no_message_of_the_library_speaks_flags():
    found = [
        f"{path.relative_to(LIBRARY)}:{line}: {text}"
        for path in sorted(LIBRARY.rglob("*.py"))
        if not str(path.relative_to(LIBRARY)).startswith(ELSEWHERE)
        for line, text in literals(path)
        if re.search(r"(?<![\w-])--[a-z]", text) and not re.fullmatch(r"--[a-z-]+", text)
    ]
    assert found == []


def test_a_pattern_of_ranks_that_is_no_pattern_is_told_in_the_caller_s_words(llama_pair):
    for surface, option in (("python", "rank_pattern=..."), ("command line", "--rank-pattern")):
        with asked_on(surface), pytest.raises(ValueError, match=re.escape(option)):
            extract(*llama_pair, 4, rank_pattern={"[": 3})
