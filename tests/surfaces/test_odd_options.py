"""Odd values of every option of every command: one clear line or click's usage, in seconds, and nothing unexpected."""

import shlex

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from peft_posthoc import budget, extract, patterns
from peft_posthoc.cli import main as cli
from peft_posthoc.ranks.rules import fixed

ODD = {
    "huge": "9" * 22,
    "of 5000 digits": "9" * 5000,
    "negative": "-1",
    "zero": "0",
    "NaN": "nan",
    "infinity": "1e400",
    "nothing": "",
    "commas": "1,,2",
    "half a pattern": "(",
    "a repetition": "a{99999999999}",
    "brackets": "(" * 2000 + ")" * 2000,
    "without end": "(.|.)*!",
    "much memory": "(?:(?:a{1000}){1000}){1000}",
    "no such group": r"(.*)=>\g<x>",
    "one name for all": ".*=>a",
    "half a rule": "(=>",
    "an escape": "\x1b[31mred\n",
    "a null": "a\0b",
    "half a character": "a\udc80b",
    "1 MB": "a" * 1_000_000,
    "deep JSON": '{"a":' * 100_000,
    "JSON of digits": f'{{"a": {"9" * 5000}}}',
    "JSON with NaN": '{"a": NaN}',
    "a device": "/dev/zero",
    "gigabytes": "9" * 400 + "GB",
    "a slash": "/",
}
LINES = {
    "extract": ["b.safetensors", "t.safetensors", "out", "--quiet"],
    "inspect": ["b.safetensors", "t.safetensors", "--quiet"],
    "verify": ["good", "--base=b.safetensors", "--tuned=t.safetensors", "--quiet"],
    "check": ["good"],
    "resize": ["good", "out", "--quiet"],
    "combine": ["good", "good", "out", "--quiet"],
    "export": ["good", "out", "--to=merged", "--base=b.safetensors", "--quiet"],
}


def values_of(command):
    """The options that take any text."""
    return [
        option.opts[0]
        for option in cli.main.get_command(None, command).params
        if isinstance(option, click.Option) and not option.is_flag and not isinstance(option.type, click.Choice)
    ]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder that commands run in: a small pair, and the adapter between the two."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    torch.manual_seed(0)
    base = {"model.layers.0.mlp.up_proj.weight": torch.randn(24, 16)}
    save_file(base, "b.safetensors")
    save_file({name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in base.items()}, "t.safetensors")
    assert run("extract", "b.safetensors", "t.safetensors", "good", "--rank=4", "--quiet") == ""
    return tmp_path


def run(*line):
    result = CliRunner().invoke(cli.main, line, prog_name="phlora")
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code in (0, 1, 2)
    assert "Unexpected " not in result.output
    assert "\x1b" not in result.output
    assert len(result.output) < 10_000
    return result.stderr


@pytest.mark.parametrize(("command", "option"), [(command, one) for command in LINES for one in values_of(command)])
def test_an_odd_value_of_an_option_is_no_crash(command, option, work):
    names = [value for value in ODD.values() if value.isprintable() and "/" not in value and 0 < len(value) < 200]
    for value in ODD.values():
        # To draw takes a while; one file name is like another.
        if option in ("--plot", "--html", "--json") and (value.startswith("/dev") or value in names[1:]):
            continue
        if option == "--out" and value == "/":
            continue  # root may write there
        rest = [word for word in LINES[command] if not word.startswith(f"{option}=")]
        run(command, *rest, f"{option}={value}")


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["a{99999999999}", "(" * 2000 + ")" * 2000, "(", r"(.|.)*!"])
def test_a_pattern_that_is_none_is_quoted_with_its_option(option, pattern, work):
    line = run("extract", "b.safetensors", "t.safetensors", "out", f"--{option}={pattern}")
    assert line.startswith(f"phlora: error: `--{option} {shlex.quote(pattern)[:100]}")
    assert "is not a regular" in line or "is nested too deep" in line or "takes longer than" in line


@pytest.mark.parametrize("rule", [r"(.*)=>\g<x>", r"(.*)=>\3", "(=>x", "(.|.)*!=>x", r"\d=>" + "\\"])
def test_a_map_that_is_none_is_quoted(rule, work):
    line = run("extract", "b.safetensors", "t.safetensors", "out", f"--map={rule}")
    assert f"`--map {shlex.quote(rule)}` " in line
    with pytest.raises(ValueError, match="rename="):
        extract("b.safetensors", "t.safetensors", 4, rename=rule)


@pytest.mark.parametrize(
    "given", [{"include": "a{99999999999}"}, {"exclude": "(.|.)*!"}, {"rank_pattern": {"(.|.)*!": 3}}]
)
def test_python_gets_a_value_error_for_a_pattern(given, work):
    with pytest.raises(ValueError, match=r"is not a regular expression|takes longer than"):
        extract("b.safetensors", "t.safetensors", 4, **given)


@pytest.mark.parametrize("form", ["portable", "peft"])
@pytest.mark.parametrize("size", [{"params": 10**22}, {"size": "9" * 20 + "GB"}, {"params": 10**15}])
def test_a_budget_beyond_everything_keeps_everything(size, form, work):
    adapter = extract("b.safetensors", "t.safetensors", budget(**size), form=form)
    (layer,) = adapter.layers.values()
    assert layer.factors.energy == pytest.approx(1)
    assert len(layer.factors.s) == 16


def test_a_rank_beyond_everything_keeps_everything(work):
    adapter = extract("b.safetensors", "t.safetensors", fixed(10**22), form="peft")
    (layer,) = adapter.layers.values()
    assert len(layer.factors.s) == 16


def test_limits_beyond_everything_leave_no_rank_or_all(work):
    sizes = ("extract", "b.safetensors", "t.safetensors", "out", "--budget=1MB")
    assert "below the smallest adapter" in run(*sizes, f"--min-rank={10**22}")
    assert "no rank" in run(*sizes, f"--round-to={10**22}", "--max-rank=4")
