"""`mergekit-phlora --refine`: the adapter of a merge, fitted to the merged model that was written."""

import json

import pytest

from peft_posthoc import refine
from tests.make import mergekit_runs
from tests.make.mergekit_runs import adapters_are_the_same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
FEW = ("--refine", "--sequences", "24", "--length", "8")


def test_the_adapter_is_refined_towards_the_merge(three, tmp_path):
    tuned = [three / "tuned", three / "tuned-too"]
    config = mergekit_runs.config(three / "base", *tuned, method="task_arithmetic", each={"weight": 0.7})
    for out, flags in (("plain", ()), ("refined", FEW)):
        assert mergekit_runs.phlora(config, tmp_path / out, "--rank", "2", *flags).exit_code == 0
    model = tmp_path / "refined"
    refine(tmp_path / "plain/phlora", three / "base", model, sequences=24, length=8).save(tmp_path / "by hand")
    adapters_are_the_same(tmp_path / "refined/phlora", tmp_path / "by hand")
    assert "refined" in json.loads((tmp_path / "refined/phlora/phlora_report.json").read_text())


def test_an_interrupted_fit_leaves_the_merge_and_nothing_to_go_on_from(three, tmp_path, monkeypatch):
    """The next merge is another model."""

    def never(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_posthoc.refinement.distil.distil.__call__", never)
    config = mergekit_runs.config(three / "base", three / "tuned", method="task_arithmetic", each={"weight": 0.7})
    done = mergekit_runs.phlora(config, tmp_path / "out", *FEW)
    assert done.exit_code == 130
    assert "The merged model is in" in done.stderr
    assert "goes on" not in done.stderr
    assert (tmp_path / "out/model.safetensors").exists()
    assert not [path for path in (tmp_path / "out").iterdir() if "phlora" in path.name]


@pytest.mark.parametrize(
    ("method", "flags", "told"),
    [("task_arithmetic", ("--no-model",), "--no-model"), ("phlora", (), "nothing to come near to")],
)
def test_where_there_is_nothing_to_come_near_to_it_is_refused_before_the_merge(three, tmp_path, method, flags, told):
    parts = {"each": {"weight": 0.7}} if method != "phlora" else {"parameters": {"rank": 2}}
    config = mergekit_runs.config(three / "base", three / "tuned", method=method, **parts)
    done = mergekit_runs.phlora(config, tmp_path / "out", *FEW, *flags)
    assert done.exit_code == 1
    assert told in done.stderr
    assert not (tmp_path / "out").exists()
