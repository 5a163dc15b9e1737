"""`phlora extract --component` and `--conv-rank`."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner

from peft_posthoc import extract
from peft_posthoc.cli.main import main
from tests.make import diffusion

pytest.importorskip("diffusers", reason="diffusers is not installed.", exc_type=ImportError)


@pytest.fixture
def pipelines(tmp_path, monkeypatch):
    """Two folders with a unet and a transformer, every weight of which is moved."""
    monkeypatch.chdir(tmp_path)
    for name, make in (("unet", diffusion.unet), ("transformer", diffusion.sd3)):
        model = make()
        tuned = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "base" / name)
        tuned.save_pretrained(tmp_path / "tuned" / name)
    for side in ("base", "tuned"):
        (tmp_path / side / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, ["extract", "base", "tuned", "out", "--quiet", *arguments])


def ranks(folder):
    return json.loads((folder / "adapter_config.json").read_text())["r"]


def test_each_component_has_its_adapter_and_its_rank(pipelines):
    done = run("--component", "unet=8", "--component", "transformer", "--rank", "16")
    assert not done.exit_code, done.output
    assert {name: ranks(pipelines / "out" / name) for name in ("unet", "transformer")} == {"unet": 8, "transformer": 16}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["vae"], "has no folder `vae`"),
        (["unet=0"], "Got `unet=0`"),
        (["unet", "unet=4"], "given twice"),
    ],
)
def test_what_is_no_component_is_refused(given, told, pipelines):
    done = run(*(word for one in given for word in ("--component", one)))
    assert done.exit_code == 2
    assert told in " ".join(done.output.replace("│", " ").split())
    assert not (pipelines / "out").exists()


def test_convolutions_have_a_rank_of_their_own(pipelines):
    adapter = extract(pipelines / "base/unet", pipelines / "tuned/unet", 4, conv_rank=2)
    found = {len(row.shape): row.rank for row in adapter.report.rows if row.rank}
    assert found == {2: 4, 4: 2}
    done = run("--component", "unet", "--rank", "4", "--conv-rank", "2", "--form", "peft")
    assert not done.exit_code, done.output
    config = json.loads((pipelines / "out/unet/adapter_config.json").read_text())
    assert sorted({config["r"], *config["rank_pattern"].values()}) == [2, 4]
