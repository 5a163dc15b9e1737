"""What the adapter leaves out: a warning for callers in Python, and a bound that it must hold."""

import json
import warnings

import pytest
import torch
from click.testing import CliRunner

from peft_posthoc import AdapterError, extract
from peft_posthoc.cli.main import main
from peft_posthoc.errors import LeftOutWarning
from peft_posthoc.ranks.rules import fixed, several
from tests.make.diagonal import diagonal, pair_with

# Of the whole: 25 + 25 in layers, 9 in a head, 1 in a norm.
DELTAS = {
    "a.weight": diagonal(4.0, 3.0),
    "b.weight": diagonal(5.0, 0.0),
    "lm_head.weight": diagonal(0.0, 3.0),
    "norm.weight": torch.tensor([1.0, 0.0]),
}
RANK_1, RANK_2 = (16 + 25) / 60, 50 / 60


def test_a_bound_that_is_held_changes_nothing():
    pair = pair_with(DELTAS)
    adapter = extract(*pair, 2, exact=True, min_energy=RANK_2 - 1e-6)
    assert adapter.report.totals.energy_of_all == pytest.approx(RANK_2)
    assert adapter.report.to_dict()["provenance"] == extract(*pair, 2, exact=True).report.to_dict()["provenance"]


@pytest.mark.parametrize("rank", [1, several((("low", fixed(1)), ("high", fixed(2))))], ids=["one", "several"])
def test_below_the_bound_is_an_error_that_says_what_is_missing(rank):
    with pytest.raises(AdapterError) as refused:
        extract(*pair_with(DELTAS), rank, exact=True, min_energy=0.8)
    said = str(refused.value)
    assert "68.3% of the whole fine-tune's energy, less than `min_energy=0.8`" in said
    assert "82.0% of their deltas'" in said
    assert "15.0%: head (carried with head=True)" in said
    assert "1.7%: norm or other vector" in said


@pytest.mark.parametrize("share", [0.0, 1.01, -1, float("nan"), "much"])
def test_a_bound_that_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match=r"`min_energy=...` is a share above 0, and at most 1"):
        extract(*pair_with(DELTAS), 1, min_energy=share)


def test_the_command_writes_nothing_below_the_bound_and_says_so(llama_pair, tmp_path):
    command = ["extract", *map(str, llama_pair), str(tmp_path / "out"), "--quiet"]
    for more in (["--rank", "4"], ["--rank", "2,4"]):
        run = CliRunner().invoke(main, [*command, *more, "--min-energy", "0.9"])
        assert run.exit_code == 1
        assert "less than `--min-energy 0.9`, and is not written" in run.output
        assert "carried with --embeddings" in run.output
        assert list(tmp_path.iterdir()) == []
    run = CliRunner().invoke(main, [*command, "--rank", "4", "--min-energy", "0.1"])
    assert (run.exit_code, run.stdout) == (0, "")
    assert json.loads((tmp_path / "out" / "phlora_report.json").read_text())["totals"]["energy_of_all"] > 0.1


def test_what_is_left_out_is_one_warning_in_python():
    with pytest.warns(LeftOutWarning) as warned:
        extract(*pair_with(DELTAS), 2)
    (one,) = warned
    assert "leaves out 15.0%: head (carried with head=True); 1.7%: norm or other vector" in str(one.message)
    assert one.filename == __file__


def test_where_next_to_nothing_is_left_out_there_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(*pair_with(DELTAS | {"norm.weight": torch.tensor([0.5, 0.0])}), 2, head=True)
