"""Configurations of merges with mistakes, and worse: `mergekit-phlora` tells each in one line, in seconds."""

import json
import logging
import shutil
import tracemalloc

import pytest
import torch
from click.testing import CliRunner

from mergekit_plugin.command import main
from mergekit_plugin.recipe import read_recipe
from peft_posthoc import patterns
from peft_posthoc.cli import main as cli
from peft_posthoc.errors import PosthocError
from tests.make import models

PHLORA = "merge_method: phlora\nbase_model: ./base\nmodels:\n  - model: ./tuned\nparameters:\n  rank: 4\n"
TIES = PHLORA.replace("phlora", "ties").replace("  rank: 4", "  weight: 1\n  density: 0.5")
SLICES = (
    "merge_method: linear\nbase_model: ./base\nparameters: {weight: 1}\n"
    "slices:\n  - sources:\n      - model: ./tuned\n        layer_range: [0, 2]\n"
)


def aliases(levels, *, merged=False):
    """A few lines that stand for 2 ** levels values."""
    lines = ["a0: &a0 {k: 1}"]
    for level in range(1, levels):
        twice = f"[*a{level - 1}, *a{level - 1}]"
        lines.append(f"a{level}: &a{level} " + (f"{{<<: {twice}}}" if merged else twice))
    return "\n".join(lines) + "\n"


def indented(text):
    return "".join(f"  {line}\n" for line in text.splitlines())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a fine-tune of it, the adapter between them, and what is none of these."""
    where = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = models.llama()
    model.save_pretrained(where / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(where / "tuned")
    line = ["extract", str(where / "base"), str(where / "tuned"), str(where / "lora"), "--rank", "4", "--quiet"]
    assert CliRunner().invoke(cli.main, line).exit_code == 0
    (where / "file").write_text("weights")
    (where / "empty").mkdir()
    for name, changes in {"slow": {"target_modules": "(.|.)*!"}, "odd": {"r": "4"}}.items():
        shutil.copytree(where / "lora", where / name)
        config = json.loads((where / "lora" / "adapter_config.json").read_text())
        (where / name / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    shutil.copytree(where / "tuned", where / "deep")
    config = json.loads((where / "tuned" / "config.json").read_text())
    (where / "deep" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    return where


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """The folder that the command runs in; patterns get half a second."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    return tmp_path


def run(*options):
    result = CliRunner().invoke(main, ["r.yml", "out", "--no-model", "--quiet", *options], prog_name="mergekit-phlora")
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert "Unexpected " not in result.output
    assert "\x1b" not in result.output
    assert len(result.output) < 5000
    return result.exit_code, result.stderr


def refused(text, work):
    """The one line that tells what is wrong with a configuration."""
    (work / "r.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, said = run()
    assert code == 1
    (line,) = (one for one in said.splitlines() if one.startswith("mergekit-phlora: error: "))
    assert not (work / "out").exists()
    return line


@pytest.mark.parametrize("text", [PHLORA, TIES, SLICES])
def test_the_good_configurations_are_good(text, work):
    (work / "r.yml").write_text(text)
    code, said = run()
    assert code == 0
    assert all(line.startswith("Warning: ") for line in said.splitlines())


MISTAKES = {
    "no models": (PHLORA.replace("models:\n  - model: ./tuned\n", ""), "'models', 'slices'"),
    "an unknown method": (PHLORA.replace("phlora", "nope"), "Unimplemented merge method nope"),
    "an unknown dtype": (PHLORA + "dtype: int8\n", "int8"),
    "an unknown out_dtype": (PHLORA + "out_dtype: float8\n", "float8"),
    "a dtype that is no text": (PHLORA + "dtype: [a]\n", "dtype: "),
    "a missing weight": (PHLORA.replace("phlora", "linear"), "parameter weight"),
    "a missing t": (PHLORA.replace("phlora", "slerp"), "parameter t "),
    "a method for one": (PHLORA.replace("phlora", "passthrough"), "requires exactly 1 inputs"),
    "an unknown parameter": (PHLORA + "  nope: 3\n", "no parameter `nope`"),
    "a rank that is a word": (PHLORA.replace("4", "many"), "(got 'many')"),
    "a rank that is a date": (PHLORA.replace("4", "2024-01-01"), "parameters.rank"),
    "a rank below 0": (PHLORA.replace("4", "-4"), "greater than or equal to 0"),
    "a rank without end": (PHLORA.replace("4", "1e400"), "finite number"),
    "a rank of 5000 digits": (PHLORA.replace("4", "9" * 5000), "4300 digits"),
    "a density that is a word": (TIES.replace("0.5", "lots"), "(got 'lots')"),
    "a model that is a file": (PHLORA.replace("./tuned", "./file"), "`./file` is no folder of a model"),
    "weights for a model": (PHLORA.replace("./tuned", "./base/model.safetensors"), "is no folder of a model"),
    "a model that is not there": (PHLORA.replace("./tuned", "./missing"), "`./missing` does not exist"),
    "a model with a bell": (PHLORA.replace("./tuned", r'"\a\e[31m"'), r"`\x07\x1b[31m` does not exist"),
    "a name of 100 kB": (PHLORA.replace("./tuned", "x" * 100_000), "File name too long"),
    "an empty folder": (PHLORA.replace("./tuned", "./empty"), "Unable to find model files at ./empty"),
    "a model that is a number": (PHLORA.replace("./tuned", "3"), "models.0.model: "),
    "models that are a map": (PHLORA.replace("models:\n  - model: ./tuned\n", "models: {a: b}\n"), "models: "),
    "a base that is a number": (PHLORA.replace("./base", "3"), "base_model: "),
    "too many layers in a model": (PHLORA.replace("./tuned", "./deep"), "`num_hidden_layers` is 1000000000"),
    "an adapter with a slow pattern": (PHLORA.replace("./tuned", "./base+./slow"), "`target_modules` of `./slow`"),
    "an odd adapter": (PHLORA.replace("./tuned", "./base+./odd"), "`odd` is not a readable LoRA adapter"),
    "too many layers": (SLICES.replace("[0, 2]", "[0, 99]"), "99 layers"),
    "far too many layers": (SLICES.replace("[0, 2]", "[0, 999999999]"), "asks for layers [0, 999999999]"),
    "layers backwards": (SLICES.replace("[0, 2]", "[2, 0]"), "asks for layers [2, 0]"),
    "layers below 0": (SLICES.replace("[0, 2]", "[-5, 2]"), "layer -5"),
    "layers in words": (SLICES.replace("[0, 2]", "[a, b]"), "layer_range"),
    "a slice of nothing": (SLICES.partition("      -")[0].rstrip() + " []\n", "without `sources`"),
    "a list": ("- a\n", "holds no configuration"),
    "nothing": ("", "holds no configuration"),
    "no text": (b"\xff\xfe\x00", "is no YAML"),
    "a null": ("a\0b", "is no YAML"),
    "a tag of Python": (PHLORA + "x: !!python/object/apply:os.system [ls]\n", "is no YAML"),
    "a 45th": (PHLORA + "x: 2024-13-45\n", "month must be in 1..12"),
    "a tag without its value": (PHLORA + "x: !!timestamp foo\n", "none of its type"),
    "a key that is a list": (PHLORA + "? [a]\n: 3\n", "unhashable key"),
    "two": (f"{PHLORA}---\n{PHLORA}", "holds 2 configurations"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_configuration_is_one_line(mistake, work):
    text, fragment = MISTAKES[mistake]
    line = refused(text, work)
    assert fragment in line
    assert len(line) < 2100


BOMBS = {
    "aliases": PHLORA + aliases(40),
    "aliases of parameters": PHLORA + indented(aliases(40)),
    "a value for a parameter": aliases(40) + PHLORA.replace(" 4", " *a39"),
    "merged maps": PHLORA + aliases(40, merged=True),
    "a list in itself": PHLORA + "x: &x [*x]\n",
    "a map in itself": PHLORA + "x: &x {a: *x}\n",
    "a map merged into itself": PHLORA + "x: &x {<<: *x}\n",
    "nested too deep": "[" * 20_000,
    "maps too deep": "{a: " * 20_000,
    "1 MB": "# \n" * 400_000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_configuration_that_says_more_than_there_is_memory_for_is_refused(bomb, work):
    assert "`r.yml` is no configuration of a merge: " in refused(BOMBS[bomb], work)


@pytest.mark.parametrize("bomb", ["aliases", "a value for a parameter", "merged maps"])
def test_aliases_take_no_memory(bomb, work):
    (work / "r.yml").write_text(BOMBS[bomb])
    tracemalloc.start()
    try:
        with pytest.raises(PosthocError, match="more than 100000 values"):
            read_recipe(work / "r.yml")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10e6


def test_aliases_within_reason_are_read(work):
    (work / "r.yml").write_text("shared: &shared {rank: 4}\n" + PHLORA.replace("\n  rank: 4", " *shared"))
    _, read = read_recipe(work / "r.yml")
    assert read["parameters"] == {"rank": 4}


def test_a_key_that_mergekit_overlooks_is_told(work, caplog):
    (work / "r.yml").write_text(PHLORA + "paramters: 3\n")
    with caplog.at_level(logging.WARNING):
        assert run()[0] == 0
    assert "`r.yml` says `paramters`, which means nothing to mergekit." in caplog.text


def test_a_device_for_a_configuration_is_not_read_to_its_end(work):
    (work / "r.yml").symlink_to("/dev/zero")
    with pytest.raises(PosthocError, match="more than 200000 bytes"):
        read_recipe(work / "r.yml")


@pytest.mark.parametrize("value", ["", "abc", "9" * 5000, "nan", "-1"])
@pytest.mark.parametrize("option", ["--out-shard-size", "--num-threads", "--random-seed", "--device", "--verbosity"])
def test_an_odd_value_of_an_option_of_mergekits_is_no_crash(option, value, work):
    (work / "r.yml").write_text(PHLORA)
    code, _ = run(f"{option}={value}")
    assert code in (0, 1, 2)
