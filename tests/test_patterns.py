"""Patterns that somebody else wrote: what `re` and PEFT make of them, and an end to what has none."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from peft_posthoc import patterns
from peft_posthoc.patterns import PatternError, check_patterns, first_matches, matched, replaced

NAMES = [
    "q_proj",
    "model.q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.xup_proj",
    "model-layers.0.mlp",
    "a.",
    "two\nlines.q_proj",
    "q_proj\n",
]
KEYS = [
    "q_proj",
    "^q_proj",
    "q_proj$",
    r"model\.q_proj",
    "model.q_proj",
    "^model.layers.0.mlp.up_proj",
    r"^model\.layers\.0\.mlp\.up_proj",
    r"model\-layers\.0\.mlp",
    r".*\.(0|1)\..*_proj",
    r"layers\.\d+\.mlp\.\w+",
    "(?!.*mlp).*",
    r"\^q_proj",
    "up_proj|q_proj",
    "",
]
ENDLESS = "(.|.)*!"


@pytest.fixture
def soon(monkeypatch):
    """Patterns get less time, and the tests need less."""
    monkeypatch.setattr(patterns, "SECONDS", 0.5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(KEYS), min_size=1, max_size=5, unique=True))
def test_the_first_key_that_a_name_ends_in_is_the_one_that_peft_finds(keys):
    found = first_matches(keys, NAMES)
    for name in NAMES:
        wanted = next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), None)
        assert found.get(name) == wanted
        assert found.get(name, name) == get_pattern_key(keys, name)


@pytest.mark.parametrize("how", ["search", "match", "fullmatch"])
@pytest.mark.parametrize("pattern", [*KEYS, "mlp", r"\.", "o_proj|up", r"(?s)two.*"])
def test_a_name_matches_as_in_re(pattern, how):
    assert matched(pattern, NAMES, how) == {name for name in NAMES if getattr(re, how)(pattern, name)}


@pytest.mark.parametrize("pattern", ["q_proj", r"layers\.(\d+)", "(?P<x>o)|a", "x*"])
@pytest.mark.parametrize("replacement", ["b", r"\g<0>.c", ""])
def test_a_name_is_replaced_as_in_re(pattern, replacement):
    assert replaced(pattern, replacement, NAMES) == [re.sub(pattern, replacement, name) for name in NAMES]


def test_many_plain_keys_are_held_against_as_many_names():
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(100) for j in range(100)]
    found = first_matches([re.escape(name) for name in names], names)
    assert len(found) == len(names)


@pytest.mark.parametrize("key", [ENDLESS, "(a+)+x"])
def test_a_pattern_without_end_is_ended(soon, key):
    names = ["a" * 60 + "?"]
    for match in (
        lambda: matched(key, names, "fullmatch"),
        lambda: first_matches(["q_proj", key], names),
        lambda: replaced(f"{key}$", "b", names),
    ):
        with pytest.raises(PatternError, match="takes longer than") as error:
            match()
        assert error.value.pattern.startswith(key)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(", "is not a regular expression: missing"),
        ("a{99999999999}", "the repetition number is too large"),
        ("(" * 2000 + ")" * 2000, "is nested too deep"),
        (r"\p{L}", "bad escape"),
    ],
)
def test_what_is_no_pattern_is_told(pattern, problem):
    for match in (
        lambda: check_patterns(["fine", ".*", pattern]),
        lambda: matched(pattern, ["a"], "search"),
        lambda: first_matches([".*x", pattern], ["a"]),
    ):
        with pytest.raises(PatternError, match=re.escape(problem)) as error:
            match()
        assert error.value.pattern == pattern


@pytest.mark.parametrize("replacement", [r"\g<x>", r"\3", r"\g<99999999999>", "\\"])
def test_what_is_no_replacement_is_told(replacement):
    with pytest.raises(PatternError, match="is not a regular expression"):
        replaced("(.*)", replacement, ["a"])


def test_new_names_have_a_bound():
    with pytest.raises(PatternError):
        replaced("", "x" * 1_000_000, ["a" * 1000])
