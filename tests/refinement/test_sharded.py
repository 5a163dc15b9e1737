"""Two processes that hold a part of both models each: what one process finds, in half of the memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_posthoc import PosthocError, distil, extract, refine
from peft_posthoc.refinement.preflight import refine_preflight
from tests.make import models
from tests.make.coded_folders import fp8, quantise
from tests.make.launched import launched, torchrun
from tests.make.shard_run import LENGTH, SEQUENCES

MAKES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (lambda: models.llama(num_hidden_layers=4), {}),
    "coded": (models.llama, {}),  # on a base of FP8
    "gpt2": (models.gpt2, {"embeddings": True}),  # tied; Conv1D
    "mixtral": (models.mixtral, {"form": "peft"}),  # experts as PEFT's target_parameters, norms kept whole
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where each pair and its adapters are, and what each of two processes says of each."""
    place, folders = tmp_path_factory.mktemp("sharded"), list[object]()
    for name, (make, options) in MAKES.items():
        torch.manual_seed(0)
        pair = models.save_pair(make(), place / name, scale=0.05)
        if name == "coded":
            quantise(pair[0], place / "codes", fp8)
            shutil.rmtree(pair[0])
            (place / "codes").rename(pair[0])
        folders += [extract(*pair, 2, dtype=torch.float32, **options).save(place / name / "svd"), *pair]
    found = launched("tests.make.shard_run", *folders)
    assert found.returncode == 0, found.stderr[-3000:]
    return place, [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


@pytest.mark.filterwarnings("ignore")  # What PEFT says of tied heads.
@pytest.mark.parametrize("name", MAKES)
def test_two_processes_with_half_of_each_model_find_what_one_does(ran: Any, name: str) -> None:
    place = ran[0] / name
    alone = refine(place / "svd", place / "base", place / "tuned", sequences=SEQUENCES, length=LENGTH)
    assert not alone.kept
    assert sum(alone.texts.values()) % 8 == 1  # A last batch of one text: one of them has nothing to do.
    before = load_file(place / "svd" / "adapter_model.safetensors")
    for factor, x in load_file(place / "svd-refined" / "adapter_model.safetensors").items():
        moved = (alone.tensors[factor] - before[factor]).abs().max()
        assert (x - alone.tensors[factor]).abs().max() <= 1e-4 * moved


def test_each_holds_half_and_no_more_than_a_block_and_what_is_around_blocks_as_a_whole(ran: Any) -> None:
    place, told = ran
    assert len(told) == 2 * len(MAKES)
    for name in MAKES:
        one, other = (found for found in told if found["adapter"] == str(place / name / "svd"))
        assert one["factors"] == other["factors"]
        assert one["own"] + other["own"] == one["all"]
        assert abs(one["own"] - other["own"]) <= 0.01 * one["all"]
    llama = next(found for found in told if found["adapter"] == str(place / "llama" / "svd"))
    assert llama["whole"] == llama["block"] + llama["around"] < llama["all"] / 2


@pytest.mark.parametrize(
    ("run", "fail", "more", "told"),
    [
        (launched, "1", [], "It is too dark here."),
        (torchrun, "", ["--prefix", "a"], "Neither the tuned model nor the base has a tokenizer"),
    ],
    ids=["in one", "in both"],
)
def test_what_goes_wrong_ends_both_with_one_line(
    llama_pair: tuple[str, str], tmp_path: Path, run: Any, fail: str, more: list[str], told: str
) -> None:
    adapter = extract(*llama_pair, 2).save(tmp_path / "svd")
    options = ["--base", llama_pair[0], "--tuned", llama_pair[1], "--shard", "--sequences", 32, "--length", 12, *more]
    ran = run("tests.make.refine_run", "refine", adapter, tmp_path / "out", *options, "--quiet", FAIL=fail)
    assert ran.returncode != 0
    lines = [line for line in ran.stderr.splitlines() if line.startswith("phlora:")]
    assert len(lines) == 1
    assert lines[0].startswith(f"phlora: error: {told}")
    assert "[rank" not in ran.stderr  # No traceback of the other one.
    assert not (tmp_path / "out").exists()


def test_one_process_alone_is_told(llama_pair: tuple[str, str], tmp_path: Path) -> None:
    adapter = extract(*llama_pair, 2).save(tmp_path / "svd")
    for run in (refine, refine_preflight):
        with pytest.raises(PosthocError, match="There is one process, and no other to split the models with"):
            run(adapter, *llama_pair, method=distil(shard=True))


def test_memory_of_a_part_is_told(tmp_path: Path) -> None:
    """Of two Llamas in float32 half, and one of them, in bfloat16 on disk, that writes."""
    base, tuned = models.save_pair(models.llama(num_hidden_layers=16), tmp_path, dtype=torch.bfloat16)
    adapter = extract(base, tuned, 2).save(tmp_path / "svd")
    whole, half, quarter = (
        refine_preflight(adapter, base, tuned, method=distil(shard=count > 1), processes=count) for count in (1, 2, 4)
    )
    assert half.models_bytes == whole.models_bytes / 2 + whole.models_bytes / 4
    assert quarter.models_bytes == whole.models_bytes / 4 + whole.models_bytes / 4
    assert "in each of 4 processes" in quarter.table()
