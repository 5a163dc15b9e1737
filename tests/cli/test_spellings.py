"""Sizes, types and shares as people write them, on the command line and in Python."""

import pytest
import torch
from click.testing import CliRunner

from peft_posthoc import budget, extract
from peft_posthoc.cli.main import main
from peft_posthoc.ranks.spelling import Misspelled, parse


def run(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)], prog_name="phlora")


@pytest.mark.parametrize(
    ("written", "bytes_"),
    [("64mb", 64e6), ("64M", 64e6), ("64 MB", 64e6), ("1.5gib", 1.5 * 2**30), ("3k", 3e3), ("2%", 20), ("7b", 7)],
)
def test_a_size_is_read_as_people_write_it(written, bytes_):
    assert budget(written).limit(1000) == bytes_


@pytest.mark.parametrize("word", ["energy", "error"])
def test_a_share_may_be_a_percentage(word):
    assert parse({word: "90%"}) == parse({word: "0.9"})


def test_folders_of_several_shares_are_named_alike_however_they_are_written():
    names = [[name for name, _ in parse({"energy": text}).named] for text in ("50%,90%", "0.5,0.9")]
    assert names == [["e0.5", "e0.9"]] * 2


@pytest.mark.parametrize("text", ["0.9", "90%"])
def test_a_share_given_as_a_rank_is_answered_with_the_option_that_takes_it(text):
    with pytest.raises(Misspelled, match=f"energy='{text}'"):
        parse({"rank": text})
    result = run("extract", "base", "tuned", "out", "--rank", text)
    assert result.exit_code == 2
    assert f"`--energy {text}`" in result.stderr


def test_a_name_that_a_format_does_not_take_is_answered_as_it_was_typed():
    result = run("extract", "base", "tuned", "out", "--to", "comfyui")
    assert result.exit_code == 2
    assert "`--to comfyui` writes one file, NAME.safetensors. Got 'out'." in result.stderr


@pytest.mark.parametrize(
    ("written", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("half", torch.float16)]
)
def test_a_type_has_its_short_names_too(written, dtype, llama_pair, tmp_path):
    assert extract(*llama_pair, 1, dtype=written).dtype == dtype
    result = run("extract", *llama_pair, tmp_path / "out", "--rank", 1, "--dtype", written, "--quiet")
    assert result.exit_code == 0, result.stderr
    assert run("resize", tmp_path / "out", tmp_path / "less", "--rank", 1, "--dtype", written, "--quiet").exit_code == 0


def test_the_least_energy_may_be_a_percentage(llama_pair, tmp_path):
    result = run("extract", *llama_pair, tmp_path / "out", "--rank", 1, "--min-energy", "99%", "--quiet")
    assert result.exit_code == 1
    assert "99" in result.stderr
    result = run("extract", *llama_pair, tmp_path / "out", "--min-energy", "most")
    assert result.exit_code == 2
    assert "'most' is no share such as 0.9 or 90%" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--rank", "x"],
        ["--rank", "0"],
        ["--energy", "2"],
        ["--device", "tpu"],
        ["--include", "("],
        ["--budget", "many"],
        ["--map", "a"],
        ["--dtype", "int3"],
    ],
)
def test_what_was_typed_wrong_ends_with_one_status_whoever_sees_it(options, llama_pair, tmp_path):
    result = run("extract", *llama_pair, tmp_path / "out", *options)
    assert result.exit_code == 2, result.stderr


def test_what_is_wrong_with_a_model_ends_with_another(llama_pair, tmp_path):
    assert run("extract", llama_pair[0], tmp_path / "absent", tmp_path / "out").exit_code == 1
