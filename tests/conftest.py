import os

# Before anything imports a host library: no test reaches a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# Shape annotations are checked here, and only here.
install_import_hook(
    [
        f"peft_posthoc.{name}"
        for name in (
            "linalg",
            "ranks.rules",
            "models.layout",
            "adapters.reader",
            "adapters.factors",
            "adapters.module",
            "inspection.curves",
        )
    ],
    "beartype.beartype",
)

import pytest
import torch

from tests.make import models


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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

    from tests.make.runs import Where

    handler = Where()
    yield handler
    logging.getLogger("hf_callbacks").removeHandler(handler)
