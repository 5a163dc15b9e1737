"""A training run is what it is without the callback: losses, log, checkpoints, weights, random numbers, collectives."""

import json

import pytest

from tests.make import traces
from tests.make.launched import launched

WITHOUT_STEPS = ("silent", "at the end", "refined here")
# Of two processes, those in which the callback does what only the first of them may: each way it works, once.
OF_TWO = ("steps", "best at the end", "here", "refined", "resumed")


def _saw(count, names, base, folder):
    """What each of one or two processes saw of every run, with the callback and without it."""
    ran = launched("tests.make.traces", folder, base, ",".join(names), count=count)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder, [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(count)]


# Two fixtures, and not one that is parametrised: pytest would make each anew whenever the other comes between.
@pytest.fixture(scope="module")
def of_one(llama_pair, tmp_path_factory):
    return _saw(1, traces.RUNS, llama_pair[0], tmp_path_factory.mktemp("one-process"))


@pytest.fixture(scope="module")
def of_two(llama_pair, tmp_path_factory):
    return _saw(2, OF_TWO, llama_pair[0], tmp_path_factory.mktemp("two-processes"))


@pytest.mark.parametrize("name", traces.RUNS)
def test_a_run_is_what_it_is_without_the_callback(name, of_one):
    _check(name, *of_one)


@pytest.mark.parametrize("name", OF_TWO)
def test_a_run_of_two_processes_is_what_it_is_without_the_callback(name, of_two):
    _check(name, *of_two)
    assert all("all_gather" in process[f"{name}-False"]["collectives"] for process in of_two[1])


def _check(name, folder, saw):
    for process in saw:
        without, with_it = process[f"{name}-False"], process[f"{name}-True"]
        assert [what for what in without if without[what] != with_it[what] and what != "ours"] == []
        assert without["summary is last"]
        assert without["weights"]
    # And it did its work: adapters, whose numbers are in the first process's log.
    out = folder / f"{name}-True/phlora"
    assert (out / "final/adapter_model.safetensors").is_file()
    assert ("refined" in json.loads((out / "final/phlora_report.json").read_text())) == name.startswith("refined")
    steps = len(list(out.glob("step-*")))
    # The resumed run goes on from the log of its checkpoint: the adapter of that step was not made yet.
    assert saw[0][f"{name}-True"]["ours"] == steps - (name == "resumed")
    assert (steps > 0) == (name not in WITHOUT_STEPS)
