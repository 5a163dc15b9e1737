import os
from pathlib import Path

# Before anything imports a host library: no test reaches a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing is compiled. bitsandbytes, which PEFT imports, would load all of inductor in every program that a test starts.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import builtins

from jaxtyping import Float, install_import_hook

from tests.make import shapes

# Shape annotations are checked here, and only here: in every module that has one. Else no module
# imports their names.
builtins.Float = Float
_ROOT = Path(__file__).parents[1]
install_import_hook(
    [
        ".".join(path.relative_to(_ROOT).with_suffix("").parts)
        for path in sorted((_ROOT / "peft_posthoc").rglob("*.py"))
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    ],
    f"{shapes.__name__}.checked",
)

import pytest
import torch

from tests.make import models


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def as_many_threads():
    """What a test sets of threads ends with it: with more than cores are idle, later tests take many times as long."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama_pair(tmp_path_factory):
    """(base, tuned) folders of a tiny Llama of which every tensor changed."""
    torch.manual_seed(0)
    return models.save_pair(models.llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tied_pair(tmp_path_factory):
    """The same with `lm_head` tied to the embeddings."""
    torch.manual_seed(0)
    return models.save_pair(models.llama(tie_word_embeddings=True), tmp_path_factory.mktemp("tied"))


@pytest.fixture
def log():
    """What the Trainer's callback logs."""
    import logging

    from tests.make.trainer_runs import Where

    handler = Where()
    yield handler
    logging.getLogger("hf_callbacks").removeHandler(handler)
