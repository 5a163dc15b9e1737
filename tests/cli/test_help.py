"""What `--help` shows."""

import shlex

import click
import pytest
from click.testing import CliRunner

from peft_posthoc.cli.main import main
from peft_posthoc.formats.export import TARGETS

COMMANDS = main.list_commands(click.Context(main))


def text_of(command):
    result = CliRunner().invoke(main, [command, "--help"], prog_name="phlora")
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_no_mark_of_click_is_shown(command):
    assert not {"\\b", "\b"} & {*text_of(command).split()}


def test_each_target_of_an_export_has_a_line():
    lines = [line.split()[0] for line in text_of("export").splitlines() if line.startswith("  ")]
    first = lines.index("gguf")
    assert lines[first : first + len(TARGETS)] == [*TARGETS]


def test_the_default_of_a_command_is_the_one_that_its_help_names():
    assert "[default: 32]" in " ".join(text_of("resize").split())
    text = " ".join(text_of("combine").split())
    assert "[default: all: the sum is exact]" in text
    assert "[default: 32]" not in text


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "mergekit"])
def test_every_command_has_examples_that_can_be_read(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    lines = text_of(command).partition("Examples:\n")[2].splitlines()
    assert lines
    for line in lines:
        _, name, *words = shlex.split(line)
        assert name == command
        assert main.get_command(None, name).make_context(name, words).params


def test_many_options_stand_in_groups_and_each_once():
    text = text_of("extract")
    lines = text[text.index("Options:") :].splitlines()
    headings = ["Options:", "Ranks:", "What is carried:", "Names:", "Models:", "Refining:", "Output:", "Examples:"]
    assert [line for line in lines if line.endswith(":") and not line.startswith(" ")] == headings
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    options = [one.opts[0] for one in main.get_command(None, "extract").params if isinstance(one, click.Option)]
    assert sorted(shown) == sorted(options)
    assert text.index("Ranks:") < text.index("--energy") < text.index("What is carried:") < text.index("--head")


def test_the_list_of_commands_has_whole_sentences():
    text = CliRunner().invoke(main, ["--help"], prog_name="phlora").stdout
    listed = text.partition("Commands:")[2]
    assert all(command in listed for command in COMMANDS)
    assert "..." not in listed


def test_the_name_alone_shows_the_help():
    result = CliRunner().invoke(main, [], prog_name="phlora")
    assert result.exit_code == 2
    assert "Commands:" in result.output


@pytest.mark.parametrize(("typed", "meant"), [("extrct", "extract"), ("catchup", "catch-up")])
def test_a_misspelt_command_is_answered_with_the_one_that_was_meant(typed, meant):
    result = CliRunner().invoke(main, [typed, "base", "tuned", "out"], prog_name="phlora")
    assert result.exit_code == 2
    assert f"No such command '{typed}'. Did you mean `phlora {meant}`?" in result.stderr


def test_a_command_that_is_like_none_is_not_guessed_at():
    result = CliRunner().invoke(main, ["xyz"], prog_name="phlora")
    assert result.exit_code == 2
    assert "Did you mean" not in result.stderr
