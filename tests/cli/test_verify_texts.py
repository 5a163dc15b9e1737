"""`phlora verify` on files of prompts and texts: the same text objects, and the same measure, as `phlora refine`'s."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from peft_posthoc import Given, extract, verify
from peft_posthoc.cli.main import main
from tests.make import models

WORDS = [f"w{i}" for i in range(90)]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair with a tokenizer of whole words, its adapter of full rank, and one of rank 2."""
    folder = tmp_path_factory.mktemp("here")
    torch.manual_seed(0)
    kept = ("norm", "embed", "lm_head")  # what a portable adapter does not carry stays
    models.save_pair(models.llama(), folder, scale=0.1, only=lambda name: not any(one in name for one in kept))
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "tuned")
    for rank in (2, 48):
        extract(folder / "base", folder / "tuned", rank).save(folder / f"r{rank}")
    (folder / "some.txt").write_text("w1 w2 w3 w4\nw5 w6 w7\nw8 w9 w10 w11\nw12 w13\n")
    return folder


def _run(here: Path, rank: int, *options: str) -> Result:
    pair = ["--base", str(here / "base"), "--tuned", str(here / "tuned")]
    return CliRunner().invoke(main, ["verify", str(here / f"r{rank}"), *pair, "--sequences", "12", *options])


@pytest.mark.parametrize("kind", ["--prompts", "--texts"])
def test_an_adapter_of_full_rank_says_what_the_tuned_model_says_on_a_file(
    here: Path, tmp_path: Path, kind: str
) -> None:
    told = tmp_path / "told.json"
    options = (kind, str(here / "some.txt"), "--length", "12", "--json", str(told), "--max-kl", "1e-5")
    done = _run(here, 48, *options)
    assert done.exit_code == 0, done.output
    found = json.loads(told.read_text())
    for kind_of in ("task", "general"):
        assert found["on_texts"]["base + adapter"][kind_of]["kl"] < 1e-5 < found["on_texts"]["base"][kind_of]["kl"]
        assert found["on_texts"]["base + adapter"][kind_of]["top1"] == 1
    assert "text like the task's" in done.stdout
    assert "On general text" in done.stdout
    # One of rank 2 is further off than is asked for, and fails.
    assert "above --max-kl" in _run(here, 2, *options).stderr


def test_texts_are_used_as_they_are_and_the_distance_is_their_logits(here: Path) -> None:
    texts = Given([[1, 2, 3, 4], [5, 6, 7]])
    found = verify(here / "r2", here / "base", here / "tuned", texts=texts, sequences=12, length=12)
    adapted, tuned = models.load_adapter(here / "base", here / "r2"), models.load(here / "tuned")
    kl = 0.0
    for ids in texts.texts:
        said, wanted = (torch.log_softmax(one(torch.tensor([ids])).logits, -1) for one in (adapted, tuned))
        kl += float((wanted.exp() * (wanted - said)).sum().detach())
    assert found.adapter.kl == pytest.approx(kl / 7, rel=1e-4)
    assert found.on_texts["base + adapter"]["task"].tokens == 7


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        (["--prompts", "some.txt", "--prompt", "w1"], 2, "compared on alone"),
        (["--prompts", "none.txt"], 1, "cannot be read"),
        (["--prompts", "some.txt", "--weights-only"], 2, "--weights-only reads no text"),
        (["--field", "x"], 2, "--field belongs"),
    ],
)
def test_what_contradicts_itself_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], status: int, told: str
) -> None:
    monkeypatch.chdir(here)
    done = _run(here, 2, *options)
    assert done.exit_code == status
    assert told in done.stderr
