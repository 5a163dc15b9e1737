"""`phlora refine`: one adapter in, one out, or one clear line and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from peft_posthoc import Sampled, extract
from peft_posthoc.cli.main import main
from peft_posthoc.refinement import usual
from tests.make.texts import tokenizer


@pytest.fixture
def here(llama_pair: tuple[str, str], tmp_path: Path) -> Path:
    extract(*llama_pair, rank=2).save(tmp_path / "adapter")
    return tmp_path


def _run(here: Path, pair: tuple[str, str], *options: str) -> Result:
    line = ["refine", str(here / "adapter"), str(here / "out"), "--base", str(pair[0]), "--tuned", str(pair[1])]
    return CliRunner().invoke(main, [*line, "--sequences", "16", "--length", "8", *options])


def test_the_table_and_the_json_say_the_same(here: Path, llama_pair: tuple[str, str]) -> None:
    done = _run(here, llama_pair, "--json", str(here / "told.json"))
    assert done.exit_code == 0, done.output
    told = json.loads((here / "told.json").read_text())
    for kind in ("task", "general"):
        assert f"{told['after'][kind]['kl']:.4f}" in done.stdout
        assert told["after"][kind]["kl"] <= told["before"][kind]["kl"]
    gone = 1 - told["after"]["task"]["kl"] / told["before"]["task"]["kl"]
    answer = (
        "Nothing better was found" if told["kept"] else f"{gone:.0%} of the distance on text like the task's is gone"
    )
    assert done.stdout.startswith(answer)
    assert (here / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "free", "method"),
    [
        (["--method", "compensated", "--damping", "0.1"], 1e9, "compensated"),
        (["--damping", "0.1"], 1e9, "compensated"),  # No other has it.
        (["--method", "blocks", "--lr", "0.1"], 1e9, "blocks"),
        (["--lr", "0.1"], 1e9, "distil"),
        (["--bf16", "--lr", "0.1"], 1e9, "distil"),
        (["--lr", "0.1"], 1e3, "blocks"),  # Both models do not fit.
    ],
)
def test_the_method_is_chosen_with_its_options(
    here: Path,
    llama_pair: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    free: float,
    method: str,
) -> None:
    monkeypatch.setattr(usual, "free_memory", lambda device: free)
    done = _run(here, llama_pair, *options, "--json", str(here / "told.json"))
    assert done.exit_code == 0, done.output
    told = json.loads((here / "told.json").read_text())["options"]["method"]
    assert told["kind"] == method
    assert told[options[-2].removeprefix("--")] == 0.1
    assert told.get("bf16", False) == ("--bf16" in options)


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        (["--prompts", "none.txt"], 1, "cannot be read"),
        (["--prompts", "a.txt", "--prefix", "x"], 2, "one of --prompts"),
        (["--field", "x"], 2, "--field belongs"),
        (["--prefix", "x"], 1, "tokenizer"),
        (["--lr", "0"], 2, "--lr"),
        (["--lr", "1", "--method", "compensated"], 2, "--lr does not belong to --method compensated"),
        (["--damping", "1", "--method", "distil"], 2, "--damping does not belong to --method distil"),
        (["--bf16", "--method", "compensated"], 2, "--bf16 does not belong to --method compensated"),
        (["--damping", "1", "--lr", "1"], 2, "No method takes --damping and --lr together"),
        (["--lr", "nan"], 2, "`lr` must be more than 0, and finite. Got nan."),
        (["--lr", "inf", "--method", "blocks"], 2, "`lr` must be more than 0, and finite. Got inf."),
        (["--passes", "nan"], 2, "`passes` must be more than 0, and finite. Got nan."),
        (["--damping", "inf"], 2, "`damping` must be more than 0, and finite. Got inf."),
        (["--minutes", "nan"], 2, "`minutes` must be more than 0, and finite. Got nan."),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    here: Path, llama_pair: tuple[str, str], options: list[str], status: int, told: str
) -> None:
    done = _run(here, llama_pair, *options)
    assert done.exit_code == status, done.output
    assert told in done.stderr
    assert "Unexpected" not in done.stderr
    assert not (here / "out").exists()


def test_that_there_is_no_place_for_it_is_told_before_text_is_written(
    here: Path, llama_pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampled, "write", None)
    line = ["refine", str(here / "adapter"), str(here / ("o" * 240)), "--base", llama_pair[0]]
    done = CliRunner().invoke(main, [*line, "--tuned", llama_pair[1]])
    assert done.exit_code == 1
    assert "cannot be kept in" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.filterwarnings("default:14 of 40:peft_posthoc.LeftOutWarning")
def test_what_is_not_used_is_told_in_a_line(here: Path, llama_pair: tuple[str, str]) -> None:
    base = shutil.copytree(llama_pair[0], here / "base")
    tokenizer().save_pretrained(base)
    (here / "prompts.txt").write_text("\n".join(f"w{i} w{i + 1}" for i in range(40)))
    done = _run(here, (str(base), llama_pair[1]), "--prompts", str(here / "prompts.txt"), "--quiet")
    assert done.stderr == "Warning: 14 of 40 prompts are used, drawn by the seed. Use more (`--sequences`).\n"


def test_an_adapter_that_is_there_is_replaced_only_by_force(here: Path, llama_pair: tuple[str, str]) -> None:
    (here / "out").mkdir()
    (here / "out" / "mine.txt").write_text("mine")
    assert "exists and is not empty" in _run(here, llama_pair).stderr
    assert (here / "out" / "mine.txt").read_text() == "mine"
