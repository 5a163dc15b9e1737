"""What runs of the Trainer share."""

import warnings

import pytest


@pytest.fixture
def base(llama_pair):
    return llama_pair[0]


@pytest.fixture(autouse=True)
def _no_wish_for_an_older_optimizer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        yield
