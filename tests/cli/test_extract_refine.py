"""`phlora extract --refine`: the extraction and the fit as one folder, or neither."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from peft_posthoc import extract, refine
from peft_posthoc.cli.main import main
from peft_posthoc.extraction.read import read_pairs
from tests.make import models

FEW = ("--sequences", "96", "--length", "8")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A pair that rank 2 loses much of."""
    torch.manual_seed(0)
    return models.save_pair(models.llama(), tmp_path_factory.mktemp("pair"), scale=0.1)


def _run(pair: tuple[str, str], out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["extract", *map(str, pair), str(out), "--rank", "2", *options])


def _factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_the_extraction_and_then_the_refinement(pair: tuple[str, str], tmp_path: Path) -> None:
    done = _run(pair, tmp_path / "out", "--refine", *FEW, "--seed", "3", "--json", str(tmp_path / "told.json"))
    assert done.exit_code == 0, done.output
    extract(*pair, 2).save(tmp_path / "svd")
    refine(tmp_path / "svd", *pair, sequences=96, length=8, seed=3).save(tmp_path / "by-hand")
    assert _same(_factors(tmp_path / "out"), _factors(tmp_path / "by-hand"))
    assert not _same(_factors(tmp_path / "out"), _factors(tmp_path / "svd"))
    report = json.loads((tmp_path / "out" / "phlora_report.json").read_text())
    before = json.loads((tmp_path / "svd" / "phlora_report.json").read_text())
    assert report["start"]["totals"]["energy"] == before["totals"]["energy"]
    assert report["refined"]["after"] == json.loads((tmp_path / "told.json").read_text())["after"]
    # Both tables are shown, and nothing else was left beside the adapter.
    assert "Energy" in done.stdout or "energy" in done.stdout
    assert f"{report['refined']['after']['task']['kl']:.4f}" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by-hand", "out", "svd", "told.json"]


def test_where_the_fit_fails_nothing_is_written_and_the_extraction_is_not_lost(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of its work is worth keeping; at once, in place of after seconds.
    monkeypatch.setattr("peft_posthoc.extraction.spool.Spool.patience", 0.0)
    done = _run(pair, tmp_path / "out", "--refine", *FEW, "--prefix", "Report:")  # there is no tokenizer
    assert done.exit_code == 1
    assert "tokenizer" in done.stderr
    assert "without `--refine`" in done.stderr
    assert not (tmp_path / "out").exists()
    kept = [path.name for path in tmp_path.iterdir()]
    assert len(kept) == 1
    assert kept[0].startswith(".out")

    extract(*pair, 2).save(tmp_path / "svd")

    # And that command takes what was kept: nothing is factored again.
    def none_left(base: object, tuned: object, names: list[str], **how: object) -> object:
        assert not names
        return read_pairs(base, tuned, names, **how)

    monkeypatch.setattr("peft_posthoc.extraction.extract.read_pairs", none_left)
    assert _run(pair, tmp_path / "out").exit_code == 0
    assert _same(_factors(tmp_path / "out"), _factors(tmp_path / "svd"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "svd"]


def test_what_cannot_be_refined_is_told_before_anything_is_factored(tmp_path: Path) -> None:
    done = _run(models.save_pair(models.t5(), tmp_path / "t5"), tmp_path / "out", "--refine", "--embeddings")
    assert done.exit_code == 1
    assert "causal" in done.stderr
    assert "Nothing was written" not in done.stderr  # which is said of a fit that failed
    assert not (tmp_path / "out").exists()


def test_models_that_no_other_process_shares_are_told_of_before_anything_is_factored(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_posthoc.extraction.extract.read_pairs", None)
    done = _run(pair, tmp_path / "out", "--refine", "--shard", *FEW)
    assert done.exit_code == 1
    assert "torchrun" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_extraction_is_of_the_budget(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, now = time.monotonic(), [0.0]

    def slow(*args: Any, **how: Any) -> Any:
        now[0] += 300
        return read_pairs(*args, **how)

    monkeypatch.setattr("time.monotonic", lambda: began + now[0])
    monkeypatch.setattr("peft_posthoc.extraction.extract.read_pairs", slow)
    done = _run(pair, tmp_path / "out", "--refine", "--minutes", "4", *FEW)
    assert done.exit_code == 1
    assert "Give more time: `--minutes" in done.stderr


def test_the_tokenizer_that_is_copied_beside_the_adapter_is_beside_the_refined_one(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    tuned = models.save(models.load(pair[1]), tmp_path / "tuned")
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    assert _run((pair[0], str(tuned)), tmp_path / "svd", "--with-tokenizer").exit_code == 0
    done = _run((pair[0], str(tuned)), tmp_path / "out", "--with-tokenizer", "--refine", *FEW)
    assert done.exit_code == 0, done.output
    refine(tmp_path / "svd", pair[0], tuned, sequences=96, length=8).save(tmp_path / "of-folder")
    for made in ("out", "of-folder"):
        assert (tmp_path / made / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--minutes", "1"], "--minutes belongs to --refine"),
        (["--prompts", "x.txt"], "--prompts belongs to --refine"),
        (["--refine", "--rank", "2,4"], "one rank"),
        (["--refine", "--stream"], "without --stream"),
        (["--refine", "--html", "x.html"], "--html"),
        (["--refine", "--field", "x"], "--field belongs"),
    ],
)
def test_options_that_contradict_each_other_are_one_line(
    pair: tuple[str, str], tmp_path: Path, options: list[str], told: str
) -> None:
    done = _run(pair, tmp_path / "out", *options)
    assert done.exit_code == 2
    assert told in done.stderr
    assert not (tmp_path / "out").exists()
