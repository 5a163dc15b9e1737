"""Messages: one line that a terminal can show, however long and odd the names in it are."""

import click
import pytest
from click.testing import CliRunner

from peft_posthoc.cli import main as cli
from peft_posthoc.errors import PosthocError, brief, one_line, printable


def test_a_message_and_its_notes_are_one_line():
    error = PosthocError("One\n  thing.")
    error.add_note("While\tdoing another.")
    assert one_line(error) == "One thing. While doing another."
    assert one_line(KeyError()) == "KeyError"


def test_a_long_name_loses_its_middle():
    line = one_line(PosthocError(f"`model.{'x' * 1_000_000}.weight` is odd."))
    assert line.startswith("`model.xxx")
    assert line.endswith("xxx.weight` is odd.")
    assert len(line) < 300


def test_many_names_are_cut_too():
    assert len(brief("name " * 100_000)) <= 2000


@pytest.mark.parametrize("odd", ["\x1b[31m", "\x07", "\u202e", "\x9b31m", "\ud800", "\u2066"])
def test_what_a_terminal_obeys_is_spelled_out(odd):
    for shown in (brief(f"`a{odd}b` is odd."), printable(f"a{odd}b\nc")):
        assert odd[0] not in shown
        assert repr(odd)[1:-1] in shown
    assert "\n" in printable(f"a{odd}b\nc")


def test_what_people_write_stays_as_it_is():
    text = "`modèle/重み` 12 %, ||delta||² ≤ 0.5: `C:\\models`."
    assert brief(text) == text
    assert printable(text) == text


def test_words_of_a_table_are_bounded():
    assert len(printable("x" * 1_000_000 + "  0.5\nsecond")) < 600


@pytest.mark.parametrize(
    "line",
    [
        ["extract", "a", "b", "c", "--params", "x" * 100_000],
        ["extract", "a", "b", "c", "--rank-pattern", "x" * 100_000],
        ["extract", "a", "b", "c", "--" + "x" * 100_000],
        ["x" * 100_000],
        ["extract", "a", "b", "c", "x" * 100_000],
    ],
)
def test_wrong_options_are_quoted_in_part(line):
    result = CliRunner().invoke(cli.main, line, prog_name="phlora")
    assert result.exit_code == 2
    assert len(result.stderr) < 2500


def test_click_lets_a_message_be_changed():
    error = click.BadParameter("a" * 1000)
    error.message = brief(error.message)
    assert len(error.format_message()) < 300
