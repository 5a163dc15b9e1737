"""The blocks of docs/trainer.md for other trainers, run as printed on the interfaces that those trainers have."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.make.trainer_runs import trainer

PAGE = (Path(__file__).parents[2] / "docs/trainer.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(# (axolotl|ms-swift).*?)```", PAGE, re.DOTALL)


class BasePlugin:
    """axolotl's has these hooks, all empty; what this one gives back is added to the trainer."""

    def add_callbacks_post_trainer(self, cfg, trainer):
        return []


def axolotl(training, base, names):
    return names["Phlora"]().add_callbacks_post_trainer(SimpleNamespace(base_model=base), training)


def swift(training, base, names):
    return [names["callbacks_map"]["phlora"](training.args, training)]


@pytest.mark.parametrize(
    ("host", "module", "offers", "callbacks"),
    [
        ("axolotl", "axolotl.integrations.base", {"BasePlugin": BasePlugin}, axolotl),
        ("ms-swift", "swift.callbacks", {"callbacks_map": {}}, swift),
    ],
)
def test_the_lines_for_another_trainer_make_adapters(
    host, module, offers, callbacks, llama_pair, tmp_path, monkeypatch
):
    for depth in range(len(module.split("."))):
        name = ".".join(module.split(".")[: depth + 1])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[module]).update(offers)
    (block,) = (block for block, name in BLOCKS if name == host)
    names = {}
    exec(block, names)
    training = trainer(llama_pair[0], tmp_path, max_steps=2)
    # Both add their callbacks to a trainer that is there already.
    for callback in callbacks(training, llama_pair[0], names):
        training.add_callback(callback)
    training.train()
    assert (tmp_path / "phlora/final/adapter_model.safetensors").is_file()
    assert [entry["phlora/checkpoint_step"] for entry in training.state.log_history if "phlora/energy" in entry] == [2]
