"""`phlora refine` with models or text that it cannot be done with: one clear line, and nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as of_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_posthoc import extract
from peft_posthoc.cli.main import main
from tests.make import models


def _without_numbers(tuned: Path) -> None:
    model = models.load(tuned)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    model.save_pretrained(tuned)


def _with_more_tokens(tuned: Path) -> None:
    model = models.load(tuned)
    model.resize_token_embeddings(104, mean_resizing=False)
    model.save_pretrained(tuned)


def _with_a_tokenizer(tuned: Path) -> None:
    words = Tokenizer(of_tokenizers.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tuned)


def _as_it_is(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "text", "told"),
    [
        (_without_numbers, None, "tuned model says what is no number"),
        (_with_more_tokens, None, "knows 96 tokens"),
        (_as_it_is, "a b\n", "tokenizer"),
        (_with_a_tokenizer, "\n\n", "holds no prompts"),
        (_with_a_tokenizer, "a\nb\na\n", "too few differ"),
        (_with_a_tokenizer, "a b a b a b a b a\n", "Allow longer texts"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    llama_pair: tuple[str, str], tmp_path: Path, change: object, text: str | None, told: str
) -> None:
    extract(*llama_pair, 2).save(tmp_path / "adapter")
    tuned = shutil.copytree(llama_pair[1], tmp_path / "tuned")
    change(tuned)  # type: ignore[operator]
    options = ["--sequences", "16", "--length", "8"]
    if text is not None:
        (tmp_path / "text.txt").write_text(text)
        options += ["--prompts" if "longer" in told else "--texts", str(tmp_path / "text.txt")]
    before = sorted(tmp_path.iterdir())
    places = [str(tmp_path / "adapter"), str(tmp_path / "out")]
    done = CliRunner().invoke(main, ["refine", *places, "--base", llama_pair[0], "--tuned", str(tuned), *options])
    assert done.exit_code == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("phlora:")]
    assert len(lines) == 1
    assert told in lines[0]
    assert sorted(tmp_path.iterdir()) == before
