"""PEFT and transformers themselves, run anew: they do what is kept of them."""

import pytest

from tests.engines import subjects
from tests.engines.record import Right, Spoiled, kept, rounding
from tests.engines.running import ENGINES, Engine, run
from tests.engines.running import HERE as DRIVERS

HERE = [name for name, engine in ENGINES.items() if engine.environment is None]


def verdicts(told):
    return {what: one["verdict"] for what, one in told.items()}


@pytest.mark.parametrize("base", ["llama", "gemma"])
def test_adapters_of_extract_and_wrong_ones(base, tmp_path):
    made = Right(base, tmp_path)
    for name in HERE:
        told, before = made.by(ENGINES[name]), kept()[name]["right"][base]
        assert verdicts(told["adapters"]) == verdicts(before["adapters"])
        assert told["adapters"]["full rank"]["from_tuned"] <= rounding(told["base"])
        assert told["adapters"]["a layer missing"]["difference"] == pytest.approx(
            before["adapters"]["a layer missing"]["difference"], rel=1e-2
        )
        if name == "peft":
            assert told["mixed"] <= rounding(told["base"])


@pytest.mark.parametrize("base", subjects.SPOILED_BASES)
def test_peft_does_what_is_kept_of_it_with_spoiled_adapters(base, tmp_path):
    told = verdicts(Spoiled(base, tmp_path).by(ENGINES["peft"]))
    assert told == {case: one["verdict"] for case, one in kept()["peft"]["spoiled"].items() if case in told}
    assert told


def test_an_adapter_that_an_engine_dies_of_is_refused_and_the_others_are_run(tmp_path, monkeypatch):
    dying = tmp_path / "drive_dying.py"
    dying.write_text(
        "import os, sys\n"
        "sys.path.insert(0, os.environ['DRIVERS'])\n"
        "import driving\n"
        "class Dying:\n"
        "    versions = {'dying': '1'}\n"
        "    def __init__(self, job): pass\n"
        "    def next_token(self, adapter, prompts):\n"
        "        if adapter and adapter.endswith('bad'): os.abort()\n"
        "        if adapter and adapter.endswith('odd'): raise ValueError('no such thing')\n"
        "        return [[0.0] for _ in prompts]\n"
        "    def mixed(self, rows): os.abort()\n"
        "driving.drive(Dying)\n"
    )
    monkeypatch.setenv("DRIVERS", str(DRIVERS))
    adapters = {}
    for name in ("bad", "odd", "good"):
        adapters[name] = tmp_path / name
        adapters[name].mkdir()
        (adapters[name] / "adapter_config.json").write_text("{}")
    ran = run(Engine("Dying", str(dying)), tmp_path, adapters, [[1], [2]], mixed=[("good", 0)])
    assert ran.adapters["bad"].startswith("the process ended with -6")
    assert ran.adapters["odd"] == "ValueError: no such thing"
    assert ran.adapters["good"].shape == (2, 1)
    assert ran.mixed.startswith("the process ended with -6")


def test_an_engine_that_does_not_start_has_refused_nothing(tmp_path):
    (tmp_path / "drive_not.py").write_text("import no_such_package")
    with pytest.raises(RuntimeError, match="Not did not start: the process ended with 1: ModuleNotFoundError"):
        run(Engine("Not", str(tmp_path / "drive_not.py")), tmp_path, {}, [[1]])
