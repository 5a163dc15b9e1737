"""The examples in `examples/mergekit`, in processes of their own."""

import shutil

import pytest
import torch
import yaml

import peft_posthoc
from tests.make import mergekit_runs
from tests.make.launched import launched
from tests.make.mergekit_runs import EXAMPLES, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def here(three, tmp_path):
    for folder in three.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    for example in EXAMPLES.glob("*.yml"):
        shutil.copy(example, tmp_path)
    return tmp_path


EXAMPLE_COMMANDS = {
    "phlora.yml": ["mergekit_plugin", "phlora.yml", "out"],
    "layers.yml": ["mergekit_plugin", "layers.yml", "out", "--adapter-out", "out-adapter"],
    "ties.yml": ["mergekit_plugin", "ties.yml", "out", "--no-model", "--rank", "16"],
    "several.yml": ["tests.make.multimerge", "several.yml", "-I", "./stages", "--out-path", "out"],
    "passthrough.yml": ["mergekit.scripts.run_yaml", "passthrough.yml", "out", "--lora-merge-cache", "cache"],
}


def test_every_example_is_run():
    assert EXAMPLE_COMMANDS.keys() == {path.name for path in EXAMPLES.iterdir()}


@pytest.mark.parametrize("name", EXAMPLE_COMMANDS)
def test_an_example(name, here):
    if name == "passthrough.yml":
        peft_posthoc.extract(str(here / "base"), str(here / "tuned"), 8).save(here / "adapter")
    ran = launched(*EXAMPLE_COMMANDS[name], count=1, cwd=here)
    assert ran.returncode == 0, ran.stderr
    parts = list(yaml.safe_load_all((here / name).read_text()))
    if name == "ties.yml":
        assert (here / "out/adapter_model.safetensors").is_file()
        return
    got = mergekit_runs.tensors(here / "out")
    assert {tensor.dtype for tensor in got.values()} == {
        getattr(torch, parts[-1].get("out_dtype") or parts[-1]["dtype"])
    }
    if name == "phlora.yml":
        wanted = mergekit_runs.expected(here / "base", here / "tuned", 16)
        same(got, {key: tensor.bfloat16() for key, tensor in wanted.items()})
    if name == "several.yml":
        same(mergekit_runs.tensors(here / "stages/first"), mergekit_runs.expected(here / "base", here / "tuned", 16))
        same(
            mergekit_runs.tensors(here / "stages/second"),
            mergekit_runs.expected(here / "base", here / "tuned-too", 0.8),
        )
