"""What `--help` shows."""

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
