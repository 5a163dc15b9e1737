"""What is shipped for other trainers, on the interfaces that they have; `tests/trainers` runs the real ones."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.make.trainer_runs import trainer


class BasePlugin:
    """axolotl's has these hooks, all empty; what this one gives back is added to the trainer."""

    def add_callbacks_post_trainer(self, cfg, trainer):
        return []


def axolotl(training, base, module):
    plugin = module.Phlora()
    package, _, name = plugin.get_input_args().rpartition(".")
    settings = getattr(importlib.import_module(package), name)(phlora={"rank": 4})
    return plugin.add_callbacks_post_trainer(SimpleNamespace(base_model=base, phlora=settings.phlora), training)


def swift(training, base, module):
    module.register(rank=4, base=base)
    return [module.callbacks_map["phlora"](training.args, training)]


def llamafactory(training, base, module):
    given = []
    module.read_args = lambda: {"stage": "sft", "phlora": {"rank": 4, "base": base}}
    module.run_exp = lambda args, callbacks: given.append((args, callbacks))
    module.main()
    ((args, callbacks),) = given
    assert args == {"stage": "sft"}
    return callbacks


@pytest.mark.parametrize(
    ("callbacks", "offers"),
    [
        (axolotl, {"axolotl.integrations.base": {"BasePlugin": BasePlugin}}),
        (swift, {"swift.callbacks": {"callbacks_map": {}}}),
        (
            llamafactory,
            {"llamafactory.hparams.parser": {"read_args": None}, "llamafactory.train.tuner": {"run_exp": None}},
        ),
    ],
)
def test_what_is_shipped_for_another_trainer_makes_adapters(callbacks, offers, llama_pair, tmp_path, monkeypatch):
    for module, names in offers.items():
        for depth in range(len(module.split("."))):
            package = ".".join(module.split(".")[: depth + 1])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        vars(sys.modules[module]).update(names)
    ours = f"hf_callbacks.{callbacks.__name__}"
    monkeypatch.delitem(sys.modules, ours, raising=False)
    shipped = importlib.import_module(ours)
    training = trainer(llama_pair[0], tmp_path, max_steps=2)
    # They add their callbacks to a trainer that is there already.
    for callback in callbacks(training, llama_pair[0], shipped):
        training.add_callback(callback)
    training.train()
    monkeypatch.delitem(sys.modules, ours)
    assert (tmp_path / "phlora/final/adapter_model.safetensors").is_file()
    (row,) = (entry for entry in training.state.log_history if "phlora/energy" in entry)
    assert (row["phlora/checkpoint_step"], row["phlora/rank"]) == (2, 4)
