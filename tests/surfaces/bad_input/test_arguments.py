"""Arguments that make no sense, refused before any SVD."""

import pytest

from tests.make.spoiled import (
    contents,
    misused,
    refused,
    run,
)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--rank", "0"], ["rank", "at least 1", "Got 0"]),
        (["--rank", "-1"], ["rank", "at least 1", "Got -1"]),
        (["--energy", "0"], ["energy", "above 0", "Got 0.0"]),
        (["--energy", "-0.5"], ["energy", "above 0", "Got -0.5"]),
        (["--energy", "1.5"], ["energy", "at most 1", "Got 1.5"]),
        (["--energy", "90"], ["energy", "Got 90.0. For 90 percent, give 0.9."]),
        (["--energy", "nan"], ["energy", "Got nan"]),
        (["--include", "q_proj"], ["--include q_proj", "matches no weight name", "layers."]),
        (["--exclude", "q_proj"], ["--exclude q_proj", "matches no weight name", "layers."]),
        (["--include", "proj", "--include", "q_proj"], ["--include q_proj", "matches no weight name"]),
        (["--include", "(proj"], ["--include '(proj'", "not a regular expression"]),
        (["--exclude", "*proj"], ["--exclude '*proj'", "not a regular expression"]),
        (["--exclude", "proj"], ["No weight", "--exclude"]),
        (["--device", "abacus"], ["no device `abacus`", "`cpu`", "`auto`"]),
        (["--device", ""], ["no device ``", "`cpu`"]),
        (["--base-revision", "v1"], ["'v1'", "base", "hub id"]),
        (["--json", "nowhere/report.json"], ["--json nowhere/report.json", "no folder `nowhere`"]),
        (["--json=base"], ["--json base", "is a folder"]),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused_before_any_svd(options, fragments, no_svd, work):
    before = contents(work)
    by_files = options == ["--exclude", "proj"] or options[0].startswith("--json")
    refused(run("extract", "base", "tuned", "out", *options), *fragments, status=1 if by_files else 2)
    assert contents(work) == before


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["base", "tuned", "out", "--rank", "many"], "'many' is not a valid integer"),
        (["base", "tuned", "out", "--rank", "1.5"], "'1.5' is not a valid integer"),
        (["base", "tuned", "out", "--energy", "most"], "'most' is not a valid float"),
        (["base", "tuned", "out", "--rank", "4", "--energy", "0.9"], "Give --rank or --energy, not both."),
        (["base", "tuned", "out", "--dtype", "int8"], "'int8' is not one of"),
        (["base", "tuned", "out", "--rnak", "4"], "--rnak"),
        (["base", "tuned"], "Missing argument 'OUT'"),
    ],
)
def test_what_is_no_argument_at_all_gets_the_usage(arguments, fragment, work):
    before = contents(work)
    misused(run("extract", *arguments), fragment)
    assert contents(work) == before


@pytest.mark.parametrize("option", ["--json", "--plot", "--html"])
def test_inspect_sees_before_the_work_that_its_file_cannot_be_written(option, no_svd, work):
    before = contents(work)
    refused(run("inspect", "base", "tuned", f"{option}=nowhere/file"), f"{option} nowhere/file", "no folder `nowhere`")
    assert contents(work) == before


def test_a_device_that_holds_no_values_is_refused(no_svd, work):
    refused(run("extract", "base", "tuned", "out", "--device", "meta"), "no device `meta`", status=2)
