"""The DPO example runs from end to end, with models so small that only the scores mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.make.limits import HANG

EXAMPLE = Path(__file__).parents[2] / "examples" / "dpo.py"
RANKS = (4, 16, 32)  # the last one is full: the model is 32 wide
LINEAR, WHOLE = "linear layers", "+ embeddings, head"
STARTS = {"SFT": "base", "DPO": "sft/checkpoint-4"}
RUNS = tuple(STARTS)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo") / "work"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), "--quick", "--work", str(folder)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "table.md").read_text() in done.stdout
    return folder


@pytest.fixture(scope="module")
def rows(work):
    return {(row["run"], row["model"], row["rank"]): row for row in json.loads((work / "table.json").read_text())}


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)


def test_table_has_both_runs_and_every_adapter(work, rows):
    models = [("start", None), ("tuned", None), *((kind, rank) for kind in (LINEAR, WHOLE) for rank in RANKS)]
    assert list(rows) == [(run, *model) for run in RUNS for model in models]
    table, along = (part.splitlines() for part in (work / "table.md").read_text().split("\n\n"))
    assert len(table) == 2 + len(rows)
    assert len(along) == 2 + 2 * len(RUNS)
    for part in (table, along):
        assert len({line.count("|") for line in part}) == 1


@pytest.mark.parametrize("run", RUNS)
def test_run_trained_every_weight(work, run):
    start, tuned = (
        load_file(work / folder / "model.safetensors") for folder in (STARTS[run], f"{run.lower()}/checkpoint-4")
    )
    assert start.keys() == tuned.keys()
    assert all((start[name] != tuned[name]).any() for name in start)


@pytest.mark.parametrize("run", RUNS)
def test_callback_left_an_adapter_of_every_checkpoint_and_of_the_end(work, run):
    folder = work / run.lower()
    steps = {path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    assert steps == {"2", "4"}
    adapters = {path.parent.name: load_file(path) for path in folder.glob("phlora/*/adapter_model.safetensors")}
    assert adapters.keys() == {"step-2", "step-4", "final"}
    assert all((adapters["final"][name] == tensor).all() for name, tensor in adapters["step-4"].items())
    assert any((adapters["final"][name] != tensor).any() for name, tensor in adapters["step-2"].items())


@pytest.mark.parametrize("run", RUNS)
def test_stock_peft_brings_the_start_nearer_to_the_tuned_model(work, run):
    # The hidden states at the end: what linear layers carry shows there, and no head.
    ids = torch.arange(2, 34)[None]
    folder = work / run.lower()

    def states(folder, adapter=None):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            return model.eval()(ids, output_hidden_states=True).hidden_states[-1]

    start, tuned = states(work / STARTS[run]), states(folder / "checkpoint-4")
    moved = (tuned - start).norm()
    assert (tuned - states(work / STARTS[run], folder / "phlora" / "final")).norm() < moved
    assert (tuned - states(work / STARTS[run], folder / "adapters" / "whole-r32")).norm() < 0.2 * moved


@pytest.mark.parametrize("run", RUNS)
def test_callback_and_table_agree(work, rows, run):
    totals = json.loads((work / run.lower() / "phlora" / "final" / "phlora_report.json").read_text())["totals"]
    row = rows[run, LINEAR, 4]
    assert (totals["energy"], totals["energy_of_all"]) == pytest.approx((row["energy"], row["energy_of_all"]))
    assert totals["relative_delta"] == pytest.approx(rows[run, "tuned", None]["relative_delta"])


@pytest.mark.parametrize("run", RUNS)
def test_energy_grows_with_rank_and_with_what_is_carried(rows, run):
    for kind in (LINEAR, WHOLE):
        energies = [rows[run, kind, rank]["energy"] for rank in RANKS]
        assert 0 < energies[0] < energies[1] < energies[2]
        assert energies[2] == pytest.approx(1)
    for rank in RANKS:
        assert rows[run, LINEAR, rank]["energy_of_all"] < rows[run, WHOLE, rank]["energy_of_all"] < 1


@pytest.mark.parametrize("run", RUNS)
def test_kl_falls_as_more_is_kept(rows, run):
    assert rows[run, "tuned", None]["kl"] == 0
    for kind in (LINEAR, WHOLE):
        assert rows[run, kind, 32]["kl"] < rows[run, kind, 4]["kl"] < rows[run, "start", None]["kl"]
    # All but the norms is there.
    assert rows[run, WHOLE, 32]["kl"] < 0.02 * rows[run, "start", None]["kl"]


@pytest.mark.parametrize("run", RUNS)
def test_rewards_are_counted_from_the_start(rows, run):
    start, tuned = (rows[run, model, None] for model in ("start", "tuned"))
    assert (start["margin"], start["accuracy"]) == (0, None)
    gaps = [abs(rows[run, WHOLE, rank]["margin"] - tuned["margin"]) for rank in (4, 32)]
    assert gaps[1] < gaps[0]
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values() if row["accuracy"] is not None)


def test_dpo_starts_where_sft_ended(rows):
    ended, started = rows["SFT", "tuned", None], rows["DPO", "start", None]
    assert all(ended[name] == started[name] for name in ("likelier", "values"))


def test_rejected_answer_has_one_value_wrong(examples):
    from demo_task import train_and_test
    from dpo_pairs import POOLS, write_pairs

    reports, _ = train_and_test(500, 0)
    pairs = write_pairs(reports)
    assert [pair.chosen for pair in pairs] == reports
    keys = set()
    for chosen, rejected in pairs:
        assert rejected.prose == chosen.prose
        assert list(rejected.facts) == list(chosen.facts)
        (key,) = (key for key in chosen.facts if chosen.facts[key] != rejected.facts[key])
        if key == "input":
            words = zip(chosen.facts[key].split(), rejected.facts[key].split(), strict=True)
            assert sum(right != wrong for right, wrong in words) == 1
        else:
            assert rejected.facts[key] in POOLS[key].split()
        keys.add(key)
    assert keys == {*POOLS, "input"}


def test_likelihoods_are_those_of_transformers_loss(work, examples):
    from demo_model import IGNORED, PROMPT_END, collate
    from demo_task import train_and_test
    from dpo_pairs import judge, write_pairs

    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    model = AutoModelForCausalLM.from_pretrained(work / "sft" / "checkpoint-4").eval()
    pairs = write_pairs(train_and_test(5, 0)[0])
    said = judge(model, tokenizer, pairs, "", batch=2)
    for side in ("chosen", "rejected"):
        for index, pair in enumerate(pairs):
            alone = collate([getattr(pair, side)], tokenizer)
            tokens = int((alone.labels != IGNORED).sum())
            loss = model(**alone._asdict()).loss.item()
            assert getattr(said, side)[index].item() == pytest.approx(-loss * tokens, rel=1e-5)
    texts = [f"{pair.chosen.prose}{PROMPT_END}{pair.chosen.answer}<eos>" for pair in pairs]
    prompts = [f"{pair.chosen.prose}{PROMPT_END}" for pair in pairs]
    count = sum(len(ids) for ids in tokenizer(texts)["input_ids"]) - sum(
        len(x) for x in tokenizer(prompts)["input_ids"]
    )
    assert said.tokens.shape == (count, len(tokenizer))
    assert said.kl(said) == 0


def test_kl_is_that_of_torch(examples):
    from dpo_pairs import Judgement

    ours, theirs = (torch.randn(7, 11, dtype=torch.double).log_softmax(-1) for _ in range(2))
    none = torch.zeros(1)
    expected = torch.nn.functional.kl_div(theirs, ours, reduction="batchmean", log_target=True)
    assert Judgement(ours, none, none).kl(Judgement(theirs, none, none)) == pytest.approx(expected.item())
