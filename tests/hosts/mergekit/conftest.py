import pytest
import torch

from tests.make import mergekit_runs, models
from tests.make.mergekit_runs import with_tokenizers


@pytest.fixture
def longer(tmp_path):
    """A base, a fine-tune with more tokens, and the configuration that merges them over the tokens of both."""
    pair = with_tokenizers(tmp_path, 96, 100)
    union = {"tokenizer": {"source": "union"}}
    return pair[0], mergekit_runs.config(*pair, method="task_arithmetic", each={"weight": 0.5}, **union)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A base and two fine-tunes of it."""
    torch.manual_seed(0)
    folder, base = tmp_path_factory.mktemp("three"), models.llama()
    for name, model in (("base", base), ("tuned", models.tuned_from(base)), ("tuned-too", models.tuned_from(base))):
        models.save(model, folder / name)
    return folder
